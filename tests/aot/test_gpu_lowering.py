"""GPU kernels lowered for H100 and A100, and compiled to PTX where a CUDA plugin is installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.matmul import MATMUL, MATMUL_INT8, mosaic_gpu
from pallas_kernels.matmul.shapes import SHAPES, Shape
from pallas_kernels.quantize import QUANTIZE

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
ODD = Shape(m=37, n=200, k=1040)
FLUX = {name: shape for name, shape in SHAPES.items() if name.startswith("flux")}

# What XLA must know of an H100 to compile for it; from NVIDIA's data sheet.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def spec(shape, dtype, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def int8_call(shape, **where):
    m, n, k = shape.m, shape.n, shape.k
    arrays = [((m, k), jnp.int8), ((n, k), jnp.int8), ((m, 1), jnp.float32), ((n, 1), jnp.float32)]
    return MATMUL_INT8, [spec(*array, **where) for array in arrays], {"out_dtype": jnp.bfloat16}


def fused_call(shape, group_size=16, step="power", **where):
    groups = -(-shape.k // group_size)
    arrays = [
        ((shape.m, shape.k), jnp.int8),
        ((shape.n, groups * group_size // 2), jnp.uint8),
        ((shape.n, -(-groups // 2)), jnp.uint8),
        ((shape.m, 1), jnp.float32),
        ((shape.n, 1), jnp.float32),
    ]
    options = {"group_size": group_size, "step": step, "out_dtype": jnp.bfloat16}
    return MATMUL, [spec(*array, **where) for array in arrays], options


def quantize_call(shape, range="absmax", step="power", **where):
    options = {"bits": 4, "group_size": 16, "range": range, "step": step, "rounding": "nearest"}
    return QUANTIZE, [spec((shape.m, shape.k), jnp.bfloat16, **where)], options


def jitted(call, implementation):
    operation, args, options = call
    function = jax.jit(lambda *a: operation(*a, implementation=implementation, **options))
    return function, args


def lower(device, call, implementation):
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    function, args = jitted(call, implementation)
    with jax.sharding.use_abstract_mesh(mesh):
        return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("make", [int8_call, fused_call])
def test_mosaic_kernels_lower_for_h100_at_flux_shapes(name, make):
    assert "mosaic_gpu" in lower(H100, make(FLUX[name]), "mosaic_gpu")


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("make", [int8_call, fused_call, quantize_call])
def test_triton_kernels_lower_for_a100_at_flux_shapes(name, make):
    assert "triton" in lower(A100, make(FLUX[name]), "triton")


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"step": "integer"}], ids=str)
def test_odd_shapes_lower(implementation, options):
    lower(H100, fused_call(ODD, **options), implementation)


@pytest.mark.parametrize("options", [{"range": "minmax"}, {"step": "integer"}], ids=str)
def test_quantize_lowers_for_odd_rows(options):
    lower(H100, quantize_call(ODD, **options), "triton")


@pytest.mark.parametrize(("device", "kernel"), [(H100, "mosaic_gpu"), (A100, "triton")])
def test_without_a_name_the_device_chooses_the_kernel(device, kernel):
    assert kernel in lower(device, fused_call(FLUX["flux-proj"]), None)


def test_mosaic_refuses_ampere_and_names_the_device():
    with pytest.raises(ValueError, match="needs a Hopper GPU, not NVIDIA A100"):
        lower(A100, int8_call(ODD), "mosaic_gpu")


def test_mosaic_refuses_groups_of_eight():
    with pytest.raises(ValueError, match="groups of a multiple of 16, not 8"):
        lower(H100, fused_call(ODD, group_size=8), "mosaic_gpu")


@pytest.mark.parametrize(("m", "n"), [(4608, 3072), (4608, 12288), (4608, 21504), (1, 18432)])
@pytest.mark.parametrize("decode", [False, True])
def test_tiles_fit_shared_memory_and_leave_few_processors_idle(m, n, decode):
    config = mosaic_gpu.choose_config(m, n, decode=decode)
    weights = mosaic_gpu.TILE_N * (mosaic_gpu.TILE_K // 2 + 4 if decode else mosaic_gpu.TILE_K)
    used = config.stages * (config.tokens * mosaic_gpu.TILE_K + weights)
    assert used < mosaic_gpu.SHARED_MEMORY
    assert config.stages >= 4
    tiles = -(-m // config.tokens) * -(-n // mosaic_gpu.TILE_N)
    if m > 64:
        ideal = m * n / (132 * config.tokens * mosaic_gpu.TILE_N)
        assert -(-tiles // 132) <= 1.1 * ideal


@pytest.fixture(scope="module")
def h100():
    """A mesh of one H100 to compile for, without having one."""
    if not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)):
        pytest.skip("needs the CUDA plugin of this JAX version: jax-cuda12-plugin, jax-cuda12-pjrt")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H100_TARGET, topology="1x1x1"
    )
    return Mesh(np.array([topology.devices[0]]), ("x",))


def compile_for(mesh, make, implementation, dump):
    sharding = NamedSharding(mesh, PartitionSpec())
    function, args = jitted(make(Shape(m=256, n=256, k=512), sharding=sharding), implementation)
    with jax.set_mesh(mesh):
        lowered = function.lower(*args)
    options = {"xla_dump_to": str(dump), "xla_dump_emitter_re": ".*"}
    lowered.compile(compiler_options=options)
    return "".join(path.read_text() for path in dump.glob("*.ptx"))


@pytest.mark.parametrize("make", [int8_call, fused_call])
def test_mosaic_kernels_use_the_int8_matrix_unit_without_serializing(
    h100, make, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    compile_for(h100, make, "mosaic_gpu", tmp_path)
    printed = "".join(capfd.readouterr())
    assert "wgmma.mma_async.sync.aligned.m64n" in printed
    assert "k32.s32.s8.s8" in printed
    assert "serialized" not in printed
    assert "0 bytes spill stores, 0 bytes spill loads" in printed


def test_triton_kernel_uses_the_int8_matrix_unit(h100, tmp_path):
    assert "k32.s32.s8.s8" in compile_for(h100, int8_call, "triton", tmp_path)


def test_quantize_rounds_as_ieee_demands(h100, tmp_path):
    ptx = compile_for(h100, quantize_call, "triton", tmp_path)
    assert "div.rn.f32" in ptx
    # Never one fused instruction: the product is rounded, then the sum that rounds to an integer.
    assert "mul.rn.f32 t, t," in ptx
    assert "add.rn.f32 t, t, 0f4B000000" in ptx
    assert "div.full" not in ptx
