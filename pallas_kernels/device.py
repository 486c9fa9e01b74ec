"""What the device that a computation is traced for can do."""

import dataclasses
import re
from typing import Any

import jax

# NVIDIA device names to compute capability times ten: an abstract device gives only its name.
_CUDA_CAPABILITY = {
    r"\b(GH|H)\d{3}|\bH20\b": 90,
    r"\b(GB|B)\d{3}": 100,
    r"RTX.*\b50\d\d": 120,
    r"\bL40S?\b|\bL4\b|RTX.*\b40\d\d|Ada": 89,
    r"\bA10G?\b|\bA40\b|RTX.*\b30\d\d|RTX A\d+": 86,
    r"\bA(100|30)\b": 80,
    r"\bT4\b|RTX.*\b20\d\d": 75,
}


# Elements of an array of bytes for Triton: Pallas gives it signed 32-bit offsets up to 2**32 bytes.
TRITON_MAX_BYTES = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """The capabilities that choose a backend."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # the maker's name, such as "NVIDIA H100 80GB HBM3" or "TPU v6 lite"
    generation: int  # CUDA compute capability times ten, or TPU generation; 0 if unknown
    int8: bool  # has matrix units for int8 x int8 -> int32
    fp8: bool  # has matrix units for float8_e4m3fn


def describe(platform: str, kind: str) -> Device:
    """Return what a device of this platform and kind can do."""
    if platform in ("gpu", "cuda"):
        matches = (number for name, number in _CUDA_CAPABILITY.items() if re.search(name, kind))
        generation = next(matches, 0)
        int8, fp8 = generation >= 75, generation >= 89
    elif platform == "tpu":
        digits = re.search(r"\d+", kind)
        generation = int(digits[0]) if digits else 0
        # v5e, v5p and v6e have int8 units; v4 refuses int8 and v7x has bfloat16 and fp8 only.
        int8, fp8 = generation in (5, 6), generation >= 7
    else:
        generation, int8, fp8 = 0, False, False
    platform = "gpu" if platform == "cuda" else platform
    return Device(platform=platform, kind=kind, generation=generation, int8=int8, fp8=fp8)


def current() -> Device:
    """Describe the device being traced for: the abstract mesh's, else JAX's default device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return describe(abstract.platform, abstract.device_kind)
    config: Any = jax.config  # its options are attributes that no stub lists
    default = config.jax_default_device
    if isinstance(default, str):
        default = jax.devices(default)[0]
    device = default or jax.devices()[0]
    return describe(device.platform, device.device_kind)


def processors() -> int:
    """Return the multiprocessors of the GPU being traced for, those of an H100 if it has no say."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", 132)


def triton_why_not(target: Device) -> str | None:
    """Say why Triton kernels with NVIDIA's assembly can't run on a device, or return None."""
    if target.platform == "gpu" and target.generation >= 80:
        return None
    return f"needs an NVIDIA GPU from Ampere on, not {target.kind}"
