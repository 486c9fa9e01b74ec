"""8-bit attention and the pass before it lowered for GPUs, and compiled to PTX for an H100."""

import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
from test_gpu_lowering import A100, H100, compile_for, lower, spec

from pallas_kernels.attention import ATTENTION, ATTENTION_INT8_FP8, quantize_heads
from pallas_kernels.attention.mosaic_gpu import SHARED_MEMORY, choose_config, shared_bytes
from pallas_kernels.attention.operands import BLOCK
from pallas_kernels.matmul.shapes import Shape
from pallas_kernels.qk_norm_rope import QK_NORM_ROPE_8BIT, Stream

# batch, queries, keys, heads, kv heads, channels of a head
SHAPES = [
    (1, 4608, 4608, 24, 24, 128),  # FLUX.1-dev, 1024x1024
    (1, 1536, 1536, 24, 24, 128),
    (1, 16896, 16896, 24, 24, 128),
    (4, 4592, 4592, 24, 8, 128),  # odd tiles, padding and groups
    (2, 1024, 1280, 20, 20, 64),
    (1, 5, 1, 1, 1, 64),
]
ANY = Shape(m=128, n=128, k=128)  # what the calls here don't look at


def attention_call(sizes, values_scaled=True, streams=None):
    """Return what makes a call of 8-bit attention, for `lower` and `compile_for`."""

    def make(shape, **where):
        del shape
        batch, tq, tk, heads, kv_heads, d = sizes
        arrays = ((batch, t, h, d) for t, h in ((tq, heads), (tk, kv_heads), (tk, kv_heads)))
        scale = spec((batch, kv_heads, d), jnp.float32) if values_scaled else None
        q, k, v = (spec(shape, jnp.bfloat16) for shape in arrays)
        codes = jax.eval_shape(lambda *x: quantize_heads(*x[:3], v_scale=x[3]), q, k, v, scale)
        codes = jax.tree.map(lambda x: spec(x.shape, x.dtype, **where), codes)
        return ATTENTION_INT8_FP8, [codes], {"scale": 0.1, "streams": streams or (tq,)}

    return make


def pass_call(shape, **where):
    """Two streams, columns behind the values, and a scale of these."""
    heads, d, tokens = 24, 128, (shape.m + 8, 3 * shape.m)

    def run(text, image, scale, rope, v_scale, **options):
        scales = {"query_scale": scale, "key_scale": scale, "epsilon": 1e-6}
        streams = tuple(Stream(qkv=x, **scales) for x in (text, image))
        return QK_NORM_ROPE_8BIT(streams, rope, heads=heads, v_scale=v_scale, **options)

    arrays = [*((1, t, 4 * heads * d) for t in tokens), (d,)]
    args = [spec(s, jnp.bfloat16, **where) for s in arrays]
    more = ((2, sum(tokens), d // 2), (1, heads, d))
    return run, [*args, *(spec(s, jnp.float32, **where) for s in more)], {}


@pytest.fixture(scope="module", autouse=True)
def _no_symbolizer():
    """Spare each compilation the seconds in which LLVM names the frames of a stack trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLVM_DISABLE_SYMBOLIZATION", "1")
        yield


@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_lowers_for_h100(sizes, scaled):
    assert "mosaic_gpu" in lower(H100, attention_call(sizes, scaled)(ANY), None)


def test_streams_are_written_apart_without_a_copy():
    text = lower(H100, attention_call(SHAPES[0], streams=(512, 4096))(ANY), None)
    assert "mosaic_gpu" in text
    assert "slice" not in text


def test_the_pass_before_lowers_for_h100():
    assert "triton" in lower(H100, pass_call(ANY), None)


def test_other_gpus_get_the_reference():
    for make in (attention_call(SHAPES[4]), pass_call):
        text = lower(A100, make(ANY), None)
        assert "mosaic_gpu" not in text
        assert "triton" not in text
    with pytest.raises(ValueError, match="needs a Hopper GPU, not NVIDIA A100"):
        lower(A100, attention_call(SHAPES[0])(ANY), "mosaic_gpu")


def test_16_bits_go_to_xla_where_cudnn_cant_be_asked_for_its_version():
    q = spec((1, 4608, 24, 128), jnp.bfloat16)
    assert "dot_general" in lower(H100, (ATTENTION, [q, q, q], {"scale": 0.1}), None)
    with pytest.raises(ValueError, match="cuDNN's version, and it has no GPU"):
        lower(H100, (ATTENTION, [q, q, q], {"scale": 0.1}), "cudnn")


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("tokens", [128, 256, 4608])
def test_tiles_fit_shared_memory(tokens, d):
    assert shared_bytes(choose_config(tokens), d) < SHARED_MEMORY


# 36 blocks of keys, as FLUX has, and 35, whose last step isn't apart from the loop.
@pytest.mark.parametrize(
    ("sizes", "spilled"),
    [
        ((1, 4608, 4608, 24, 24, 128), 256),
        ((1, 4480, 4480, 24, 24, 128), 0),
        ((1, 4608, 4608, 24, 24, 64), 0),
    ],
    ids=str,
)
def test_attention_uses_the_8_bit_matrix_units_without_serializing(
    sizes, spilled, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    streams = (512, sizes[1] - 512)  # as double-stream blocks have them
    compile_for(H100, attention_call(sizes, streams=streams), None, tmp_path)
    printed = "".join(capfd.readouterr())
    d = sizes[-1]
    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in printed
    # With eight columns of sums behind the values.
    assert f"wgmma.mma_async.sync.aligned.m64n{d + 8}k32.f32.e4m3.e4m3" in printed
    assert "ex2.approx" in printed  # for the factors of sums alone: two a row and step
    assert printed.count("ex2.approx") <= 2 * 4
    assert "cvt.rn.f32.s32" not in printed  # the bits of a product are the float
    assert printed.count("max.s32") >= BLOCK
    assert "serialized" not in printed
    found = [int(x) for x in re.findall(r"(\d+) bytes spill stores", printed)]
    assert found and max(found) <= spilled


@pytest.fixture(scope="module")
def pass_ptx(tmp_path_factory):
    """The pass before, compiled for an H100: its files."""
    folder = tmp_path_factory.mktemp("pass")
    compile_for(H100, pass_call, None, folder)
    return list(folder.glob("*.ptx"))


def test_the_pass_before_rounds_with_the_units_for_it_and_moves_whole_vectors(pass_ptx):
    ptx = "".join(path.read_text() for path in pass_ptx)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    # Hadamard on the tensor cores.
    assert re.search(r"wgmma\.mma_async\.\S*f32\.bf16\.bf16", ptx)
    assert "ld.global.v4.b32" in ptx
    # int8 and float8 go out 16 bytes at a time: a head of 128 tokens is 16 KiB, 64 bytes a thread.
    assert ptx.count("st.global.v4.b32") >= 12
    assert "st.global.b8" not in ptx
    # Products and sums in one, which XLA's Triton leaves apart: squares, the rotation, rounding.
    assert ptx.count("fma.rn.f32") >= 5 * 32


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas on the path")
def test_two_programs_of_the_pass_before_share_a_processor(pass_ptx, tmp_path):
    """Of 8 warps each: so many registers of a thread are free."""
    found = []
    for path in pass_ptx:
        if "_8bit" in path.read_text():
            command = ["ptxas", "-v", "-arch=sm_90a", "-o", tmp_path / "out", path]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            assert "0 bytes spill stores" in said
            found += [int(x) for x in re.findall(r"Used (\d+) registers", said)]
    assert len(found) == 2
    assert max(found) <= 65536 // (2 * 8 * 32)
