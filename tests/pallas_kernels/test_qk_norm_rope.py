"""Every backend of the norm and rotation of queries and keys against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from backends import ON_HARDWARE, jit, subjects
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels.qk_norm_rope import QK_NORM_ROPE, Stream, qk_norm_rope

# Every shape compiles anew, so the examples are few and aren't shrunk.
few_examples = settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
FLUX = [((512, 4096), 9216), ((4608,), 21504)] if ON_HARDWARE else []


def random_call(rng, batch, tokens, heads, d, columns, dtype):
    """Return streams and a rotation; some heads are zero, and magnitudes differ by token."""

    def stream(count):
        x = rng.standard_normal((batch, count, columns)) * rng.choice([0, 1e-4, 1, 40], columns)
        x *= np.exp(rng.standard_normal((batch, count, 1)))
        scales = (rng.uniform(0.2, 3, d).astype(dtype) for _ in range(2))
        epsilon = float(10 ** rng.uniform(-7, 0))
        scales = dict(zip(SCALES, scales, strict=True))
        return Stream(qkv=jnp.asarray(x, dtype), **scales, epsilon=epsilon)

    angles = rng.uniform(-7, 7, (sum(tokens), d // 2))
    rope = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    return tuple(stream(count) for count in tokens), rope


SCALES = ("query_scale", "key_scale")


def check(subject, streams, rope, heads):
    """Hold queries and keys within one rounding of float64, and values equal."""
    found = jit(subject, lambda s, r: subject(s, r, heads=heads))(streams, rope)
    parts = zip(*(exact(stream, heads) for stream in streams), strict=True)
    *normed, values = (np.concatenate(part, axis=1) for part in parts)
    dtype = streams[0].qkv.dtype
    for ours, wide in zip(found[:2], normed, strict=True):
        wanted, size = rotate(wide, rope)
        assert ours.dtype == dtype
        # One rounding to dtype, and float32 operations before it.
        bound = np.float64(jnp.finfo(dtype).eps) / 2 * np.abs(wanted) + 2e-6 * size
        bound += np.float64(jnp.finfo(dtype).smallest_subnormal)
        assert (np.abs(np.asarray(ours, np.float64) - wanted) <= bound).all()
    np.testing.assert_array_equal(found[2], values.astype(dtype))


def exact(stream, heads):
    """Return normed queries, normed keys, and values in float64, [b, t, heads, d]."""
    qkv, *scales = (np.asarray(getattr(stream, n), np.float64) for n in ("qkv", *SCALES))
    qkv = qkv[..., : 3 * heads * len(scales[0])]
    parts = np.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
    normed = (
        x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + stream.epsilon) * scale
        for x, scale in zip(parts, scales, strict=False)
    )
    return *normed, parts[2]


def rotate(x, rope):
    """Return the complex product of pairs of channels with the rotation, and its terms' size."""
    cos, sin = np.asarray(rope, np.float64)[:, :, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even + 1j * odd) * (cos + 1j * sin)
    size = np.abs(even * cos) + np.abs(odd * sin), np.abs(even * sin) + np.abs(odd * cos)
    pairs = (np.stack(pair, axis=-1) for pair in ((turned.real, turned.imag), size))
    return tuple(pair.reshape(x.shape) for pair in pairs)


@pytest.mark.parametrize("subject", subjects(QK_NORM_ROPE))
class TestQKNormRope:
    """What every backend does."""

    @few_examples
    @given(
        seed=st.integers(0, 2**31),
        batch=st.integers(1, 3),
        tokens=st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
        heads=st.integers(1, 12),
        d=st.sampled_from([4, 16, 64, 128]),
        more=st.integers(0, 200),
        dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
    )
    def test_random_shapes(self, subject, seed, batch, tokens, heads, d, more, dtype):
        rng = np.random.default_rng(seed)
        call = random_call(rng, batch, tokens, heads, d, 3 * heads * d + more, dtype)
        check(subject, *call, heads)

    @pytest.mark.parametrize(("tokens", "columns"), [((8, 24), 9216), *FLUX], ids=str)
    def test_heads_of_flux(self, subject, tokens, columns):
        call = random_call(np.random.default_rng(1), 1, tokens, 24, 128, columns, jnp.bfloat16)
        check(subject, *call, 24)


def test_kernels_leave_float32_to_the_reference():
    streams, rope = random_call(np.random.default_rng(2), 2, (3, 5), 2, 16, 96, jnp.float32)
    check(qk_norm_rope, streams, rope, 2)


def call_with(**change):
    """Return the arguments of a good call, changed."""
    (first, second), rope = random_call(np.random.default_rng(3), 1, (3, 5), 2, 16, 96, jnp.float32)
    fields = vars(second) | {k: v for k, v in change.items() if k in vars(second)}
    call = {"streams": (first, Stream(**fields)), "rope": rope, "heads": 2}
    return call | {k: v for k, v in change.items() if k not in fields}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": ()}, r"streams is a tuple of \(\); it must be a tuple of Stream"),
        ({"streams": [1]}, "streams is a list; it must be a tuple of Stream"),
        ({"qkv": np.ones((5, 96), np.float32)}, r"qkv has shape \[5, 96\]; it must be \[b, t, "),
        ({"qkv": np.ones((1, 5, 96), np.int8)}, "qkv has dtype int8; it must be floating"),
        ({"qkv": np.ones((2, 5, 96), np.float32)}, "only their tokens may differ"),
        ({"qkv": np.ones((1, 5, 96), np.float16)}, "only their tokens may differ"),
        ({"query_scale": np.ones(8, np.float32)}, "must have the same shape"),
        ({"heads": 3}, "qkv has 96 columns for 3 heads of 16"),
        ({"epsilon": -1.0}, "epsilon is -1.0; it must be at least 0"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        (
            {"rope": np.ones((2, 7, 8), np.float32)},
            r"rope has shape \[2, 7, 8\]; it must be",
        ),
        ({"implementation": "triton"}, "triton: needs an NVIDIA GPU from Ampere on, not"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    if ON_HARDWARE and "implementation" in change:
        pytest.skip("this device may run it")
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**call_with(**change))
