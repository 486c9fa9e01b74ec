"""GPU kernels lowered for four GPUs, and compiled to PTX where a CUDA plugin is installed."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels import aot, device
from pallas_kernels.matmul import MATMUL, MATMUL_INT8, mosaic_gpu, triton_few_rows
from pallas_kernels.matmul.dequantize import DEQUANTIZE
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.operands import Branch, Epilogue
from pallas_kernels.qk_norm_rope import QK_NORM_ROPE, Stream
from pallas_kernels.quantize import QUANTIZE, Norm, Part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA must know of a GPU to compile for it; from NVIDIA's data sheets."""

    kind: str  # what it calls itself
    cores: int  # multiprocessors
    capability: tuple[int, int]  # compute capability, major and minor
    threads: int  # of a multiprocessor
    shared: int  # bytes of shared memory of a multiprocessor, 1 KiB more than a block may have
    l2: int  # bytes
    bandwidth: int  # bytes a second
    clock: float  # GHz
    memory: int  # bytes

    @property
    def abstract(self) -> AbstractDevice:
        """The device to trace for."""
        return AbstractDevice(device_kind=self.kind, num_cores=self.cores, platform="gpu")

    @property
    def target(self) -> str:
        """The description that XLA reads."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared} threads_per_core_limit: {self.threads}
  core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.kind}"
"""


H100 = Gpu(
    kind="NVIDIA H100 80GB HBM3",
    cores=132,
    capability=(9, 0),
    threads=2048,
    shared=228 * 2**10,
    l2=50 * 2**20,
    bandwidth=3_352_320_000_000,
    clock=1.98,
    memory=80 * 2**30,
)
A100 = Gpu(
    kind="NVIDIA A100-SXM4-80GB",
    cores=108,
    capability=(8, 0),
    threads=2048,
    shared=164 * 2**10,
    l2=40 * 2**20,
    bandwidth=2_039_000_000_000,
    clock=1.41,
    memory=80 * 2**30,
)
L4 = Gpu(
    kind="NVIDIA L4",
    cores=58,
    capability=(8, 9),
    threads=1536,
    shared=100 * 2**10,
    l2=48 * 2**20,
    bandwidth=300_000_000_000,
    clock=2.04,
    memory=24 * 2**30,
)
RTX_4090 = Gpu(
    kind="NVIDIA GeForce RTX 4090",
    cores=128,
    capability=(8, 9),
    threads=1536,
    shared=100 * 2**10,
    l2=72 * 2**20,
    bandwidth=1_008_000_000_000,
    clock=2.52,
    memory=24 * 2**30,
)
GPUS = [H100, A100, L4, RTX_4090]
on_gpus = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.kind)
ODD = Shape(m=37, n=200, k=1040)
FLUX = {name: shape for name, shape in SHAPES.items() if name.startswith("flux")}


def spec(shape, dtype, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def placed(tree, where):
    """Return shapes with a sharding."""
    return jax.tree.map(lambda a: spec(a.shape, a.dtype, **where), tree)


def int8_call(shape, **where):
    arguments = aot.abstract_rows(shape.m, shape.k), aot.abstract_rows(shape.n, shape.k)
    return MATMUL_INT8, placed((*arguments, Epilogue()), where), {}


def fused_call(shape, group_size=16, step="power", levels="uniform", **where):
    kind = {"group_size": group_size, "step": step, "levels": levels}
    w = aot.abstract_packed(shape.n, shape.k, **kind)
    return MATMUL, placed((aot.abstract_rows(shape.m, shape.k), w, Epilogue()), where), {}


def branch_call(shape, rank=32, **where):
    """Stretched levels, and everything in the epilogue."""
    operation, (x, w, _), options = fused_call(shape, 16, "integer", "stretched", **where)
    epilogue = Epilogue(
        bias=spec((shape.n,), jnp.bfloat16),
        gate=spec((shape.n,), jnp.bfloat16),
        residual=spec((shape.m, shape.n), jnp.bfloat16),
        branch=Branch(
            input=spec((shape.m, rank), jnp.bfloat16), up=spec((shape.n, rank), jnp.bfloat16)
        ),
        activation="gelu",
    )
    return operation, (x, w, placed(epilogue, where)), options


def few_rows_call(shape, **where):
    return fused_call(dataclasses.replace(shape, m=2), **where)


def passes_call(shape, **where):
    """Few rows by programs that go through several times as many weight rows."""
    _, args, _ = few_rows_call(shape, **where)
    config = triton_few_rows.Config(tile_n=4, passes=4, warps=1)
    return lambda *a, implementation: triton_few_rows.matmul(*a, config=config), args, {}


def quantize_call(shape, range="absmax", step="power", **where):
    options = {"bits": 4, "group_size": 16, "range": range, "step": step, "rounding": "nearest"}
    return QUANTIZE, [spec((shape.m, shape.k), jnp.bfloat16, **where)], options


def quantize_parts_call(shape, **where):
    """Two parts, one through GELU, then a norm, and packed."""
    _, _, options = quantize_call(shape)
    half = shape.k // 2

    def run(first, second, shift, scale, **options):
        parts = [(first, None), (second, "gelu")]
        parts = tuple(Part(array=a, start=0, size=half, activation=f) for a, f in parts)
        norm = Norm(shift=shift, scale=scale, epsilon=1e-6)
        return QUANTIZE(parts, norm=norm, packed=True, **options)

    shapes = [(shape.m, half)] * 2 + [(2 * half,)] * 2
    return run, [spec(s, jnp.bfloat16, **where) for s in shapes], options


def rotated_call(shape, rotation=16, **where):
    """Everything that may come before the rounding to stretched levels, and 8-bit groups."""
    operation, args, options = quantize_call(shape, step="integer", **where)
    options |= {"levels": "stretched", "rotation": rotation}
    options["wide"] = tuple(i % 8 == 0 for i in range(shape.k // 16))

    def run(x, shift, scale, multiplier, **options):
        norm = Norm(shift=shift, scale=scale, epsilon=1e-6)
        return operation(x, norm=norm, multiplier=multiplier, **options)

    vectors = [spec((shape.k,), dtype, **where) for dtype in (jnp.bfloat16, *[jnp.float32] * 2)]
    return run, [*args, *vectors], options


def gated_call(shape, **where):
    """Two images: an RMS norm of each behind a product of columns, 8 bits."""

    def run(wide, scale, **options):
        part = Part(array=wide, start=0, size=shape.k, activation="silu", times=shape.k)
        return QUANTIZE((part,), norm=Norm(scale=scale, kind="rms"), **options)

    _, _, options = quantize_call(shape)
    args = [spec((2 * shape.m, 2 * shape.k), jnp.bfloat16, **where)]
    return run, [*args, spec((2, shape.k), jnp.float32, **where)], options | {"bits": 8}


def images_call(shape, **where):
    """Gates of two images and a residual."""
    operation, (x, w, _), options = fused_call(
        dataclasses.replace(shape, m=2 * shape.m), 16, "integer", "stretched", **where
    )
    epilogue = Epilogue(
        gate=spec((2, shape.n), jnp.bfloat16), residual=spec((2 * shape.m, shape.n), jnp.bfloat16)
    )
    return operation, (x, w, placed(epilogue, where)), options


def dequantize_call(shape, dtype=jnp.bfloat16, **where):
    _, (_, w, _), _ = fused_call(shape, 32, "integer", "stretched", **where)
    return lambda w, **options: DEQUANTIZE(w, dtype, **options), (w,), {}


def qk_norm_rope_call(shape, **where):
    """Two streams, and columns behind the values."""
    heads, d, tokens = 24, 128, (shape.m, 3 * shape.m)

    def run(text, image, scale, rope, **options):
        scales = {"query_scale": scale, "key_scale": scale, "epsilon": 1e-6}
        streams = tuple(Stream(qkv=x, **scales) for x in (text, image))
        return QK_NORM_ROPE(streams, rope, heads=heads, **options)

    shapes = [*((1, t, 4 * heads * d) for t in tokens), (d,)]
    args = [spec(s, jnp.bfloat16, **where) for s in shapes]
    return run, [*args, spec((2, sum(tokens), d // 2), jnp.float32, **where)], {}


STRETCHED_8 = {"group_size": 8, "step": "integer", "levels": "stretched"}
stretched_call = functools.partial(fused_call, **STRETCHED_8)
TRITON_FORMS = {
    "int8": (int8_call, "triton"),
    "fused": (fused_call, "triton"),
    "few rows": (few_rows_call, "triton_few_rows"),
    "few rows in passes": (passes_call, "triton_few_rows"),
    "quantize": (quantize_call, "triton"),
    "quantize parts after a norm, packed": (quantize_parts_call, "triton"),
    "quantize rotated channels": (rotated_call, "triton"),
    "quantize gated parts of images": (gated_call, "triton"),
    "gates of images": (images_call, "triton"),
    "dequantize": (dequantize_call, "triton"),
    "qk norm rope": (qk_norm_rope_call, "triton"),
}


def jitted(call, implementation):
    operation, args, options = call
    function = jax.jit(lambda *a: operation(*a, implementation=implementation, **options))
    return function, args


def lower(gpu, call, implementation):
    mesh = AbstractMesh((1,), ("x",), abstract_device=gpu.abstract)
    function, args = jitted(call, implementation)
    with jax.sharding.use_abstract_mesh(mesh):
        return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("make", [int8_call, fused_call])
def test_mosaic_kernels_lower_for_h100_at_flux_shapes(name, make):
    # The name by which profiles tell it from attention.
    assert "matmul_mosaic_gpu" in lower(H100, make(FLUX[name]), "mosaic_gpu")


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("make", [int8_call, fused_call, quantize_call])
def test_triton_kernels_lower_for_a100_at_flux_shapes(name, make):
    assert "triton" in lower(A100, make(FLUX[name]), "triton")


@on_gpus
@pytest.mark.parametrize("form", TRITON_FORMS)
def test_every_triton_kernel_lowers_for_every_gpu(form, gpu):
    make, implementation = TRITON_FORMS[form]
    assert "triton" in lower(gpu, make(ODD), implementation)


@pytest.mark.parametrize("m", [4608, 333])
def test_gates_of_images_lower_for_hopper(m):
    assert "mosaic_gpu" in lower(H100, images_call(Shape(m=m, n=3072, k=3072)), "mosaic_gpu")


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("rank", [1, 32, 100])
def test_branches_of_any_rank_lower(implementation, rank):
    lower(H100, branch_call(ODD, rank), implementation)


def test_branches_that_mosaic_refuses_are_left_to_triton():
    call = branch_call(ODD, 129)
    with pytest.raises(ValueError, match=r"branches of a rank up to 128, not bfloat16\[200, 129\]"):
        lower(H100, call, "mosaic_gpu")
    assert "triton" in lower(H100, call, None)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"group_size": 32}, {"step": "integer"}, STRETCHED_8], ids=str
)
def test_odd_shapes_lower(implementation, options):
    lower(H100, fused_call(ODD, **options), implementation)


@pytest.mark.parametrize("options", [{"range": "minmax"}, {"step": "integer"}], ids=str)
def test_quantize_lowers_for_odd_rows(options):
    lower(H100, quantize_call(ODD, **options), "triton")


@pytest.mark.parametrize(
    ("gpu", "kernel"),
    [(H100, "mosaic_gpu"), (A100, "triton"), (L4, "triton"), (RTX_4090, "triton")],
    ids=lambda value: getattr(value, "kind", value),
)
def test_without_a_name_the_device_chooses_the_kernel(gpu, kernel):
    assert kernel in lower(gpu, fused_call(FLUX["flux-proj"]), None)
    assert "matmul_few_rows" in lower(gpu, few_rows_call(FLUX["flux-proj"]), None)


@pytest.mark.parametrize("make", [quantize_call, fused_call, qk_norm_rope_call])
def test_programs_of_many_rows_lie_on_the_axis_without_a_limit(make):
    text = lower(A100, make(Shape(m=2**17, n=64, k=1024)), "triton")
    grids = re.findall(r"grid_x = (\d+) .*?grid_y = (\d+) .*?grid_z = (\d+)", text)
    assert max(int(x) for x, _, _ in grids) >= 2**17 or make is fused_call  # whole tiles of rows
    assert all(int(side) < 2**16 for _, *sides in grids for side in sides)


@pytest.mark.parametrize("make", [quantize_call, fused_call])
def test_arrays_beyond_32_bit_offsets_are_left_to_xla(make):
    mesh = AbstractMesh((1,), ("x",), abstract_device=A100.abstract)
    with jax.sharding.use_abstract_mesh(mesh):
        for rows, runs in ((2**16 - 1, True), (2**16, False)):
            operation, args, options = make(Shape(m=rows, n=64, k=2**15))
            reason = operation.backend("triton").why_not(device.current(), *args, **options)
            assert (reason is None) == runs
    assert "up to 2**31 - 1 elements" in reason


def test_mosaic_refuses_ampere_and_names_the_device():
    with pytest.raises(ValueError, match="needs a Hopper GPU, not NVIDIA A100"):
        lower(A100, int8_call(ODD), "mosaic_gpu")


@pytest.mark.parametrize(("m", "n"), [(4608, 3072), (4608, 12288), (4608, 21504), (1, 18432)])
@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("rank", [0, 32, 128])
def test_tiles_fit_shared_memory_and_leave_few_processors_idle(m, n, decode, rank):
    config = mosaic_gpu.choose_config(m, n, decode=decode, rank=rank)
    weights = mosaic_gpu.TILE_N * (mosaic_gpu.TILE_K // 2 + 8 if decode else mosaic_gpu.TILE_K)
    used = config.stages * (config.tokens * mosaic_gpu.TILE_K + weights)
    used += 2 * rank * (config.tokens + mosaic_gpu.TILE_N)
    used += mosaic_gpu.WARPGROUPS * mosaic_gpu.OUTPUT_TOKENS * mosaic_gpu.ROWS * 2
    assert used < mosaic_gpu.SHARED_MEMORY
    assert config.stages >= (3 if rank else 4)
    tiles = -(-m // config.tokens) * -(-n // mosaic_gpu.TILE_N)
    if m > 64 and rank < 128:
        ideal = m * n / (132 * config.tokens * mosaic_gpu.TILE_N)
        assert -(-tiles // 132) <= 1.1 * ideal


@pytest.mark.parametrize(
    ("n", "decode", "tokens"), [(12288, True, 256), (12288, False, 192), (3072, True, 224)]
)
def test_the_fastest_of_measured_tiles_is_chosen(n, decode, tokens):
    """On an H200, 4608 rows: mlp-up of FLUX in stretched levels and in int8, and proj."""
    assert mosaic_gpu.choose_config(4608, n, decode=decode).tokens == tokens


@pytest.fixture(scope="module", autouse=True)
def _no_symbolizer():
    """Spare each compilation the seconds in which LLVM names the frames of a stack trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLVM_DISABLE_SYMBOLIZATION", "1")
        yield


@functools.cache
def mesh_of(gpu):
    """Return a mesh of one GPU to compile for, without having one."""
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        pytest.skip("needs the CUDA plugin of this JAX version: jax-cuda12-plugin, jax-cuda12-pjrt")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=gpu.target, topology="1x1x1"
    )
    return Mesh(np.array([topology.devices[0]]), ("x",))


def compile_for(gpu, make, implementation, dump):
    mesh = mesh_of(gpu)
    sharding = NamedSharding(mesh, PartitionSpec())
    function, args = jitted(make(Shape(m=256, n=256, k=512), sharding=sharding), implementation)
    with jax.set_mesh(mesh):
        lowered = function.lower(*args)
    options = {"xla_dump_to": str(dump), "xla_dump_emitter_re": ".*"}
    lowered.compile(compiler_options=options)
    return "".join(path.read_text() for path in dump.glob("*.ptx"))


@pytest.mark.parametrize("make", [int8_call, fused_call, stretched_call, branch_call])
def test_mosaic_kernels_use_the_int8_matrix_unit_without_serializing(
    make, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compile_for(H100, make, "mosaic_gpu", tmp_path)
    printed = "".join(capfd.readouterr())
    assert "wgmma.mma_async.sync.aligned.m64n" in printed
    assert "k32.s32.s8.s8" in printed
    assert ("f32.bf16.bf16" in printed) == (make is branch_call)
    assert "serialized" not in printed
    assert "0 bytes spill stores, 0 bytes spill loads" in printed


@on_gpus
def test_fused_triton_decodes_bytes_at_once_for_the_int8_matrix_unit(gpu, tmp_path):
    ptx = compile_for(gpu, fused_call, "triton", tmp_path)
    assert "mad.lo.u32 a0, a0, p, 0x80808080" in ptx
    assert "prmt.b32" in ptx
    unit = r"wgmma\.mma_async\.\S*k32\.s32\.s8\.s8"
    if gpu is not H100:
        unit = r"mma\.sync\.aligned\.m16n8k32\S*\.s32\.s8\.s8\.s32"
    assert re.search(unit, ptx)


@on_gpus
@pytest.mark.parametrize("make", [few_rows_call, passes_call])
def test_few_rows_multiply_four_bytes_at_once(gpu, make, tmp_path):
    ptx = compile_for(gpu, make, "triton_few_rows", tmp_path)
    assert "dp4a.s32.s32" in ptx
    assert "mma" not in ptx


@on_gpus
@pytest.mark.parametrize("make", [quantize_call, quantize_parts_call])
def test_quantize_rounds_as_ieee_demands(gpu, make, tmp_path):
    ptx = compile_for(gpu, make, "triton", tmp_path)
    assert "div.rn.f32" in ptx
    # Never one fused instruction: the product is rounded, then the sum that rounds to an integer.
    assert "mul.rn.f32 t, t," in ptx
    assert "add.rn.f32 t, t, 0f4B000000" in ptx
    # GELU's exponential and reciprocal alone may be approximate.
    assert ("ex2.approx" in ptx, "rcp.approx" in ptx) == (make is quantize_parts_call,) * 2
    assert "div.full" not in ptx


def test_stage_2_takes_four_bytes_of_a_group_at_once(tmp_path):
    """A thread's four elements are neighbours: there's one store of as many bytes as it has."""

    def make(shape, **where):
        return quantize_call(dataclasses.replace(shape, k=1024), **where)

    ptx = compile_for(H100, make, "triton", tmp_path)
    assert ptx.count("sub.u32 v, 0x80808080, w") == 2  # of eight elements of each of 128 threads
    assert "st.global.v2.b32" in ptx
    assert "prmt.b32 n, e, f, 0x5410" in ptx


@on_gpus
def test_decoding_to_16_bits_stores_whole_vectors(gpu, tmp_path):
    ptx = compile_for(gpu, dequantize_call, "triton", tmp_path)
    assert "cvt.rn.bf16x2.f32 w3, y, x" in ptx
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize(("rotation", "shuffled"), [(16, 0.5), (64, 2.5), (256, 4.5)])
def test_rotations_shuffle_registers_and_use_no_shared_memory(rotation, shuffled, tmp_path):
    """Sixteen channels take a shuffle for two elements; each step between threads two for one."""

    def counts(rotation):
        def make(shape, **where):
            shape = dataclasses.replace(shape, k=1024)
            operation, args, options = quantize_call(shape, **where)
            return operation, args, options | {"rotation": rotation}

        folder = tmp_path / str(rotation)
        folder.mkdir()
        ptx = compile_for(H100, make, "triton", folder)
        return [ptx.count(word) for word in ("shfl.sync", "st.shared", "bar.sync", "matrix.sync")]

    elements = 8  # of each of 128 threads
    (plain, *memory), (rotated, *memory_rotated) = counts(None), counts(rotation)
    assert rotated - plain == shuffled * elements
    assert memory_rotated == memory


def test_channels_that_come_rotated_take_no_instruction_of_a_rotation(tmp_path):
    """Of 8192 channels 6144 are rotated: three quarters of the additions and shuffles."""

    def counts(**rotated):
        def make(shape, **where):
            shape = dataclasses.replace(shape, k=8192)
            operation, args, options = quantize_call(shape, **where)
            return operation, args, options | rotated

        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        ptx = compile_for(H100, make, "triton", folder)
        words = ("add.rn.f32", "sub.rn.f32", "shfl.sync")
        return np.array([ptx.count(word) for word in words])

    plain, part = counts(), counts(rotation=16, rotated_from=2048)
    np.testing.assert_array_equal(4 * (part - plain), 3 * (counts(rotation=16) - plain))


@on_gpus
def test_norm_and_rotation_move_whole_vectors(gpu, tmp_path):
    ptx = compile_for(gpu, qk_norm_rope_call, "triton", tmp_path)
    assert ptx.count("ld.global.v4.b32") >= 3
    assert ptx.count("st.global.v4.b32") == 3
