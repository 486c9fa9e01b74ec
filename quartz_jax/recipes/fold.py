"""Rotations that cost nothing at run time: folded into the values of an attention.

Attention makes sums over tokens of its values, head by head, so that an orthogonal matrix for the
channels of heads may multiply the rows that make the values, and their biases, instead of what
attention makes of them: y = (P V R) (W R)^T for V R = x (R W_v)^T (QuaRot, arXiv 2404.00456,
section 4; R is symmetric). All layers that read the mixtures must then expect them so.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from quartz_jax.recipes.sites import Mixture, Site
from quartz_jax.transforms.rotate import Folded, Rotate, Turned, block_size

if TYPE_CHECKING:
    from quartz_jax.recipes.recipe import LayerRecipe

_READERS = ("attention_out", "mixed_out")  # roles of layers that read what attention makes
Assigned = dict[str, "LayerRecipe"]  # by path of the layer


def fold(assigned: Assigned, sites: Iterable[Site]) -> tuple[Assigned, dict[str, str]]:
    """Fold the rotations of layers where that is asked for and can be.

    Args:
      assigned: what is done to each layer that is quantized.
      sites: all layers of the model.

    Returns:
      What is done to each layer, with `Folded` and `Turned`; and by path of the layers that a fold
      was asked for, and that rotate online all the same, the reason.
    """
    by_path = {site.path: site for site in sites}
    reasons: dict[str, str] = {}
    folded: dict[str, Folded] = {}
    turned: dict[str, Turned] = {}
    for path, layer in assigned.items():
        mixture, reads = by_path[path].mixture, by_path[path].role in _READERS
        if not any(isinstance(step, Rotate) and step.fold for step in layer.transforms):
            continue
        if mixture is None:
            reasons |= {path: "the model states no values for it"} if reads else {}
        elif not _asked(layer):
            reasons[path] = "its rotation isn't the first of its transforms"
        elif reason := _why_not(mixture, assigned, by_path):
            reasons[path] = reason
        else:
            folded[path], size = _folded(_rotation(layer), mixture, by_path[path].k)
            for source, first in mixture.values:
                turned[source] = Turned(size=size, first=first, rows=mixture.rows)
    found = {x: _with(layer, folded.get(x), turned.get(x)) for x, layer in assigned.items()}
    return found, reasons


def _why_not(mixture: Mixture, assigned: Assigned, by_path: Mapping[str, Site]) -> str | None:
    """Say why a mixture can't come rotated, or return None."""
    for path in mixture.layers:
        if path not in assigned:
            return f"{path} isn't quantized"
    if len({by_path[path].block for path in mixture.layers}) > 1:
        return "its values are made in another block"
    for path in mixture.outputs:
        if not _asked(assigned[path]):
            return f"{path} doesn't begin with a rotation that folds"
    rotations = [_rotation(assigned[path]) for path in mixture.outputs]
    if len(set(rotations)) > 1:
        return f"{' and '.join(mixture.outputs)} rotate otherwise"
    sizes = [(x, by_path[x].k) for x in mixture.outputs]
    for channels in (mixture.head_dim, *(k for _, k in sizes)):
        if channels % 4:
            return f"4 doesn't divide {channels} channels"
    inside = block_size(rotations[0].fold, mixture.head_dim)
    online = max(block_size(rotations[0].block, k) for _, k in sizes)
    if inside < online:
        return f"blocks in heads of {mixture.head_dim} channels are of {inside}, online of {online}"
    return None


def _folded(rotation: Rotate, mixture: Mixture, k: int) -> tuple[Folded, int]:
    """Return what a layer's rotation becomes, and the channels of a block that comes rotated."""
    inside, first = block_size(rotation.fold, mixture.head_dim), mixture.columns
    size = inside if k == first else block_size(rotation.block, k, first)
    return Folded(size=size, first=first, folded=inside), inside


def _with(layer: "LayerRecipe", folded: Folded | None, turned: Turned | None) -> "LayerRecipe":
    """Return what is done to a layer, with what takes its rotation's place and comes before all."""
    if folded is None and turned is None:
        return layer
    rest = layer.transforms if folded is None else (folded, *layer.transforms[1:])
    return dataclasses.replace(layer, transforms=rest if turned is None else (turned, *rest))


def _asked(layer: "LayerRecipe") -> bool:
    """Whether a layer's rotation is to be folded where it can be."""
    return any(isinstance(step, Rotate) and step.fold for step in layer.transforms[:1])


def _rotation(layer: "LayerRecipe") -> Rotate:
    step = layer.transforms[0]
    assert isinstance(step, Rotate)
    return step
