"""Device names to capabilities."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import device


@pytest.mark.parametrize(
    ("platform", "kind", "generation", "int8", "fp8"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", 90, True, True),
        ("gpu", "NVIDIA H200", 90, True, True),
        ("gpu", "NVIDIA GH200 480GB", 90, True, True),
        ("gpu", "NVIDIA A100-SXM4-40GB", 80, True, False),
        ("gpu", "NVIDIA A10G", 86, True, False),
        ("gpu", "NVIDIA L4", 89, True, True),
        ("gpu", "NVIDIA B200", 100, True, True),
        ("gpu", "NVIDIA GeForce RTX 4090", 89, True, True),
        ("gpu", "NVIDIA RTX A6000", 86, True, False),
        ("gpu", "Tesla T4", 75, True, False),
        ("gpu", "Tesla V100-SXM2-16GB", 0, False, False),
        ("cuda", "NVIDIA H100 80GB HBM3", 90, True, True),
        ("tpu", "TPU v4", 4, False, False),
        ("tpu", "TPU v5 lite", 5, True, False),
        ("tpu", "TPU v5p", 5, True, False),
        ("tpu", "TPU v6 lite", 6, True, False),
        ("tpu", "TPU7x", 7, False, True),
        ("cpu", "cpu", 0, False, False),
    ],
)
def test_a_device_is_known_by_its_name(platform, kind, generation, int8, fp8):
    got = device.describe(platform, kind)
    assert (got.generation, got.int8, got.fp8) == (generation, int8, fp8)
    assert got.platform in ("cpu", "gpu", "tpu")


@pytest.mark.parametrize(
    ("platform", "kind", "runs"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", True),
        ("gpu", "NVIDIA A100-SXM4-40GB", True),
        ("gpu", "Tesla T4", False),
        ("gpu", "AMD Instinct MI300X", False),
        ("tpu", "TPU v6 lite", False),
        ("cpu", "cpu", False),
    ],
)
def test_kernels_with_ptx_run_from_ampere_on(platform, kind, runs):
    reason = device.triton_why_not(device.describe(platform, kind))
    assert reason == (None if runs else f"needs an NVIDIA GPU from Ampere on, not {kind}")


def test_without_a_mesh_the_default_device_counts():
    assert device.current().platform == jax.default_backend()


def test_the_device_of_an_abstract_mesh_counts_before_the_default():
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        assert device.current().generation == 90
