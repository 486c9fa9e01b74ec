"""The linears of a model: where they are, and what they are in it."""

import dataclasses
from collections.abc import Iterator

from flax import nnx

# What a layer is in its model; models say so themselves. "linear" are those of models that don't.
ROLES = {
    "embed": "brings inputs to the model's width",
    "modulation": "shifts, scales and gates from a condition: one row an image",
    "attention_in": "queries, keys and values",
    "attention_out": "behind attention",
    "mlp_in": "first of an MLP",
    "mlp_out": "last of an MLP, behind its activation",
    "mixed_in": "attention_in and mlp_in in one",
    "mixed_out": "attention_out and mlp_out in one",
    "outlier_out": "last of an MLP whose inputs are known to overflow 16-bit floats",
    "head": "to the model's outputs",
    "linear": "any of a model that states no roles",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A layer that can be quantized."""

    path: str  # in the model, such as "double_blocks.0.img_attn.qkv"
    kind: str  # "linear"
    n: int  # outputs
    k: int  # inputs
    block: int | None  # of the list that it lies in; None outside of lists
    role: str  # one of `ROLES`


def sites(model: nnx.Module) -> list[Site]:
    """Return the linears of a model in the order in which it holds them.

    A model that states the role of none is taken to have plain linears; of one that does, those
    without a role are left alone, as "embed".

    Raises:
      ValueError: a linear is of a class, or stands in a place, that quantization would break; it
        is named.
    """
    found = [(path, module, getattr(module, "role", None)) for path, module in linears(model)]
    stated = any(role is not None for _, _, role in found)
    return [
        Site(
            path=path,
            kind="linear",
            n=module.out_features,
            k=module.in_features,
            block=_block(path),
            role=role or ("embed" if stated else "linear"),
        )
        for path, module, role in found
    ]


def linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Yield path and module of each linear of a model; of one that stands twice, its first path."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear) and path:
            yield ".".join(map(str, path)), module


def _block(path: str) -> int | None:
    return next((int(name) for name in path.split(".") if name.isdigit()), None)
