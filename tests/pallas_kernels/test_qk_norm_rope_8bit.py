"""Every backend of the pass that writes what 8-bit attention reads, against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, jit, subjects
from test_qk_norm_rope import SCALES, exact, random_call, rotate

from pallas_kernels import device
from pallas_kernels.attention import operands
from pallas_kernels.qk_norm_rope import (
    QK_NORM_ROPE_8BIT,
    Stream,
    qk_norm_rope_8bit,
    triton_8bit,
)

# batch, tokens of each stream, heads, channels of a head, columns behind the values
CALLS = [
    (2, (5,), 1, 32, 0),
    (1, (100, 160, 3), 2, 64, 40),  # blocks with keys of two streams, a last one of 7
    (1, (128,), 2, 128, 128),
    (3, (128, 70), 1, 64, 0),  # streams that share no block of keys, several batch elements
]
if ON_HARDWARE:
    CALLS += [
        (1, (512, 4096), 24, 128, 0),
        (2, (4592,), 24, 128, 12288),
        (4, (77, 4083), 24, 64, 0),
        (1, (1, 1), 1, 32, 0),
    ]


def run(subject, streams, rope, **options):
    """Return the result under jit; rope and streams are its arguments."""

    def call(streams, rope, v_scale):
        return subject(streams, rope, v_scale=v_scale, **options)

    return call, streams, rope


def check_codes(x, x_size, codes, scale, eps):
    """Hold codes [b, t, heads, d] under scales [b, t, heads] within half a step of float64.

    Args:
      x: normed and turned rows, float64.
      x_size: of the terms that they are sums of.
      codes: int8, without padding.
      scale: of each row.
      eps: of the dtype that the rows are rounded to before.
    """
    d = x.shape[-1]
    rotation = operands.hadamard(d) / np.sqrt(d)
    # Each channel is rounded once, after float32 operations; 127.001 as scales are float32.
    slack = (eps / 2 * np.abs(x) + 2e-6 * x_size) @ np.abs(rotation) + 1e-6 * np.abs(x).sum(
        axis=-1, keepdims=True
    )
    error = np.abs(np.asarray(codes, np.float64) * scale[..., None] - x @ rotation)
    assert (error <= 0.5001 * scale[..., None] + slack).all()
    return np.abs(x @ rotation), slack


@pytest.mark.parametrize("subject", subjects(QK_NORM_ROPE_8BIT))
class TestQKNormRope8Bit:
    """What every backend does."""

    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("call", CALLS, ids=str)
    def test_close_to_float64(self, subject, call, scaled):
        batch, tokens, heads, d, more = call
        dtype, rng = jnp.bfloat16, np.random.default_rng(1)
        streams, rope = random_call(rng, batch, tokens, heads, d, 3 * heads * d + more, dtype)
        v_scale = rng.uniform(0.05, 4, (batch, heads, d)).astype(np.float32) if scaled else None
        function, *args = run(subject, streams, rope, heads=heads)
        found = jit(subject, function)(*args, v_scale)
        count = sum(tokens)
        assert found.tokens == count
        parts = zip(*(exact(stream, heads) for stream in streams), strict=True)
        q, k, v = (np.concatenate(part, axis=1) for part in parts)
        eps = np.float64(jnp.finfo(dtype).eps)
        self.check_queries(found, rotate(q, rope), eps)
        self.check_keys(found, rotate(k, rope), eps)
        self.check_values(found, v, v_scale)

    def test_scales_may_have_another_dtype(self, subject):
        streams, rope = random_call(np.random.default_rng(8), 1, (70, 70), 1, 32, 96, jnp.bfloat16)
        wide = tuple(
            dataclasses.replace(s, **{k: getattr(s, k).astype(np.float32) for k in SCALES})
            for s in streams
        )
        function, *args = run(subject, streams, rope, heads=1)
        wanted = jit(subject, function)(*args, None)
        for other in (wide, wide[:1] + streams[1:]):
            found = jit(subject, function)(other, rope, None)
            jax.tree.map(np.testing.assert_array_equal, found, wanted)

    def check_queries(self, found, wanted, eps):
        count = wanted[0].shape[1]
        scale = np.asarray(found.q_scale, np.float64).transpose(0, 2, 1)[:, :count]
        size, slack = check_codes(*wanted, found.q[:, :count], scale, eps)
        largest = size.max(axis=-1)
        bound = slack.max(axis=-1) + 1e-6 * largest
        assert (np.abs(127 * scale - largest)[largest > 0] <= bound[largest > 0]).all()

    def check_keys(self, found, wanted, eps):
        count = wanted[0].shape[1]
        blocks = np.asarray(found.k_scale, np.float64).transpose(0, 2, 1)
        scale = np.repeat(blocks, operands.BLOCK, axis=1)[:, :count]
        size, slack = check_codes(*wanted, found.k[:, :count], scale, eps)
        for i in range(blocks.shape[1]):
            here = slice(i * operands.BLOCK, min((i + 1) * operands.BLOCK, count))
            largest, bound = (x[:, here].max(axis=(1, 3)) for x in (size, slack))
            there = largest > 0
            wrong = np.abs(127 * blocks[:, i] - largest) > bound + 1e-6 * largest
            assert not (wrong & there).any()
        padding = np.asarray(found.k)[:, count:]
        np.testing.assert_array_equal(padding, 0 * padding + found.k[:, count - 1 : count])

    def check_values(self, found, wanted, v_scale):
        d, count = wanted.shape[3], wanted.shape[1]
        codes = np.asarray(operands.from_kernel_order(found.v.astype(jnp.float32)), np.float64)
        assert (codes[:, :, d:, :count] == 1).all()
        assert (codes[..., count:] == 0).all()
        scale = 1.0 if v_scale is None else v_scale[..., None].astype(np.float64)
        wanted = np.clip(wanted.transpose(0, 2, 3, 1) / scale, -448, 448)
        # e4m3 has three bits behind the point, and steps of 2**-9 below 2**-6.
        bound = 2.0**-4 * np.abs(wanted) + 2.0**-10
        assert (np.abs(codes[:, :, :d, :count] - wanted) <= 1.00001 * bound).all()

    @pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_makes_its_scale_not_a_number(self, subject, what):
        streams, rope = random_call(np.random.default_rng(2), 1, (130,), 2, 32, 192, jnp.bfloat16)
        qkv = streams[0].qkv.at[0, 3, 5].set(what)  # query 3, head 0
        qkv = qkv.at[0, 4, 64 + 40].set(what)  # key 4, head 1
        qkv = qkv.at[0, 5, 128 + 9].set(what)  # value 5, head 0, channel 9
        streams = (dataclasses.replace(streams[0], qkv=qkv),)
        function, *args = run(subject, streams, rope, heads=2)
        found = jit(subject, function)(*args, None)
        assert np.argwhere(np.isnan(found.q_scale)).tolist() == [[0, 0, 3]]
        assert np.argwhere(np.isnan(found.k_scale)).tolist() == [[0, 1, 0]]
        values = operands.from_kernel_order(found.v.astype(jnp.float32))
        if np.isnan(what):
            assert np.argwhere(np.isnan(values)).tolist() == [[0, 0, 9, 5]]
        else:  # they end there
            assert values[0, 0, 9, 5] == np.sign(what) * operands.E4M3_MAX
            assert not np.isnan(values).any()

    def test_a_rotation_that_is_not_a_number_spoils_its_token_alone(self, subject):
        streams, rope = random_call(np.random.default_rng(7), 1, (130,), 1, 32, 96, jnp.bfloat16)
        function, *args = run(subject, streams, jnp.asarray(rope).at[1, 7, 3].set(jnp.nan), heads=1)
        found = jit(subject, function)(*args, None)
        assert np.argwhere(np.isnan(found.q_scale)).tolist() == [[0, 0, 7]]
        assert np.argwhere(np.isnan(found.k_scale)).tolist() == [[0, 0, 0]]


def test_kernels_say_what_they_need():
    hopper, ampere = (device.describe("gpu", f"NVIDIA {name}") for name in ("H100", "A100"))

    def reason(target, d, dtype=jnp.bfloat16):
        qkv = jax.ShapeDtypeStruct((1, 5, 3 * d), dtype)
        scale = jax.ShapeDtypeStruct((d,), dtype)
        streams = (Stream(qkv=qkv, query_scale=scale, key_scale=scale, epsilon=1e-6),)
        rope = jax.ShapeDtypeStruct((2, 5, d // 2), jnp.float32)
        return triton_8bit.why_not(target, streams, rope, heads=1)

    assert reason(hopper, 128) is None
    assert reason(ampere, 128) == "needs a GPU that rounds to float8, not NVIDIA A100"
    assert reason(hopper, 256) == "needs heads of 32 to 128 channels, not 256"
    assert reason(hopper, 128, jnp.float32) == "takes 16-bit floats, not float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"v_scale": np.ones((16,), np.float32)}, r"v_scale has shape \[16\]; it must be \[1, 2,"),
        ({"v_scale": np.ones((1, 2, 16))}, "v_scale has dtype float64; it must be float32"),
        ({"implementation": "mosaic"}, "unknown implementation 'mosaic'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    streams, rope = random_call(np.random.default_rng(3), 1, (3, 5), 2, 16, 96, jnp.float32)
    with pytest.raises(ValueError, match=message):
        qk_norm_rope_8bit(**{"streams": streams, "rope": rope, "heads": 2} | change)


def test_a_hadamard_matrix_needs_a_power_of_two():
    streams, rope = random_call(np.random.default_rng(4), 1, (5,), 2, 24, 144, jnp.float32)
    with pytest.raises(ValueError, match="heads have 24 channels"):
        qk_norm_rope_8bit(streams, rope, heads=2)
