"""Refusing arguments at the public boundary, by name and with what is allowed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import codec

CHOICES = {  # what the number format and the operations know
    "group_size": (8, 16, 32, 64),
    "rounding": ("nearest", "truncate"),
    "range": ("absmax", "minmax"),
    "step": ("power", "integer"),
    "levels": ("uniform", "stretched"),
    "activation": (None, "gelu"),  # of a product
    "activation of a part": (None, "gelu", "silu"),
    "norm.kind": ("layer", "rms"),
    "bits": (4, 8),
    "value_bits": (4, 8),
}


def check_choices(**values: Any) -> None:
    """Refuse a value of the number format that isn't listed, or a pair that it excludes."""
    for name, value in values.items():
        choices = CHOICES[name]
        if isinstance(value, bool | float) or value not in choices:
            *first, last = map(repr, choices)
            raise ValueError(f"{name} is {value!r}; it must be {', '.join(first)} or {last}")
    if values.get("step") == "integer":
        for name, needed in {"range": "absmax", "rounding": "nearest"}.items():
            if values.get(name, needed) != needed:
                raise ValueError(
                    f"{name} is {values[name]!r} with step='integer'; an integer step needs "
                    f"{needed!r}"
                )
    if values.get("levels") == "stretched" and values.get("step", "integer") != "integer":
        raise ValueError(
            f"step is {values['step']!r} with levels='stretched'; stretched levels need 'integer'"
        )


def check_stretched_steps(
    name: str,
    shifts: Any,  # [..., ceil(groups / 2)], uint8: packed, of stretched levels
) -> None:
    """Refuse stored steps beyond 14, whose levels leave int8; what isn't concrete is let pass."""
    if isinstance(shifts, jax.core.Tracer) or not isinstance(shifts, jax.Array | np.ndarray):
        return
    if isinstance(shifts, jax.Array) and not shifts.is_fully_addressable:
        return
    stored = np.asarray(shifts)
    largest = int(np.maximum(stored & 15, stored >> 4).max(initial=0))
    if largest >= codec.MAX_STRETCHED_STEP:
        raise ValueError(
            f"{name} holds a step of {largest + 1} with levels='stretched'; steps must be "
            f"1 to {codec.MAX_STRETCHED_STEP}, stored less 1"
        )


def check_array(
    name: str,
    array: Any,
    shape: tuple[int | str, ...],  # extents; a name where any will do
    dtype: Any,  # the only one allowed, or jnp.floating for any of these
) -> None:
    """Refuse what isn't an array of this shape and dtype."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"{name} is a {type(array).__name__}; it must be an array")
    given = array.shape
    if len(given) != len(shape) or any(
        isinstance(wanted, int) and found != wanted
        for found, wanted in zip(given, shape, strict=True)
    ):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(given)}; it must be [{wanted}]")
    if not jnp.issubdtype(array.dtype, dtype):
        wanted = "floating" if dtype is jnp.floating else jnp.dtype(dtype).name
        raise ValueError(f"{name} has dtype {array.dtype}; it must be {wanted}")


def check_tuple(name: str, value: Any, kind: type, *, otherwise: str = "") -> None:
    """Refuse what isn't a tuple of one or more of a kind; `otherwise` says what else is allowed."""
    several = isinstance(value, tuple)
    if several and value and all(isinstance(item, kind) for item in value):
        return
    kinds = ", ".join(type(item).__name__ for item in value) if several else ""
    found = f"tuple of ({kinds})" if several else type(value).__name__
    raise ValueError(f"{name} is a {found}; it must be {otherwise}a tuple of {kind.__name__}")


def check_k(k: int) -> None:
    """Refuse rows without elements, which have no scale."""
    if k < 1:
        raise ValueError(f"k is {k}; rows must have at least one element")


def check_of_images(
    name: str,
    vectors: Any,  # [columns], or [images, columns]: of as many rows each
    rows: int,
    columns: int,
) -> None:
    """Refuse what isn't a vector for all rows, or one for each image of whole rows."""
    if getattr(vectors, "ndim", 1) != 2:
        check_array(name, vectors, (columns,), jnp.floating)
        return
    check_array(name, vectors, ("images", columns), jnp.floating)
    images = vectors.shape[0]
    if images < 1 or rows % images:
        raise ValueError(f"{name} is of {images} images; {rows} rows aren't as many for each")
