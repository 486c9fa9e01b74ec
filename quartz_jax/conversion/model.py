"""Applying a recipe to a model, layer by layer: one in memory, or one that is read as it goes."""

import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm

from quartz_jax.conversion.report import LayerReport, Report, measure_layer, squared_norms
from quartz_jax.engine.linear import (
    QuantizedWeight,
    QuartzLinear,
    abstract_weight,
    encode_weight,
    round_to_bf16,
)
from quartz_jax.formats.tensors import IntTensor, QuartzTensor
from quartz_jax.recipes.recipe import Recipe, Rule

M = TypeVar("M", bound=nnx.Module)

# Elements of a weight that are quantized at once: the codec's float32 and int32 intermediates then
# stay in a CPU's cache, which is twice as fast, and small beside the model.
_ELEMENTS_AT_ONCE = 2**22
# Part of a model that holds what lies in no list of blocks: embedders, the last layer.
_OTHER = "other"


def quantize_model(model: M, recipe: Recipe, *, progress: bool = False) -> tuple[M, Report]:
    """Return a copy of a model whose linears are quantized by a recipe, and a report.

    The given model is untouched; the copy shares its arrays. Everything that stays 16-bit is
    rounded to bfloat16 values (in the dtype it has), which is what a checkpoint stores: the result
    is the same before saving and after loading, whatever dtype the model computes in.

    Args:
      model: any NNX model with nnx.Linear layers.
      recipe: its rules decide by the linears' paths, such as "double_blocks.0.img_attn.qkv".
      progress: show a bar over the layers on stderr.

    Raises:
      ValueError: a rule matches nothing, or a weight holds a NaN or an infinity; it is named.
    """
    elements = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    model, layers = nnx.clone(model), []
    for path, parent, name, rule in tqdm(_plan(model, recipe), "quantizing", disable=not progress):
        linear = _child(parent, name)
        weight, report = quantize_layer(path, linear.kernel.get_value(), linear.bias, rule)
        layers.append(report)
        _set_child(parent, name, QuartzLinear(weight, linear.bias, rule.activation))
    nnx.update(model, jax.tree.map(round_to_bf16, nnx.state(model, nnx.Param)))
    other = 2 * elements - sum(layer.bytes_bf16 for layer in layers)
    return model, Report(recipe=recipe.name, layers=tuple(layers), other_bytes=other)


def quantize_layer(
    path: str,
    kernel: jax.Array | np.ndarray,  # [k, n]; fastest as the transposed view of a numpy [n, k]
    bias: nnx.Param | None,  # [n]: only counted
    rule: Rule,
) -> tuple[QuartzTensor | IntTensor, LayerReport]:
    """Quantize the weight of one linear, some outputs at a time, and measure what it did.

    Raises:
      WeightError: it holds a NaN or an infinity; names the layer.
    """
    k, n = kernel.shape
    rows = 2 ** int(math.log2(max(_ELEMENTS_AT_ONCE // k, 1)))
    slices, squares = [], np.zeros(2)
    for start in range(0, n, rows):
        if isinstance(kernel, np.ndarray):  # copied where it is contiguous, transposed after
            part = jnp.asarray(kernel.T[start : start + rows]).T
        else:
            part = kernel[:, start : start + rows]
        slices.append(encode_weight(path, part, rule.weight))
        squares += np.asarray(squared_norms(part, slices[-1]), np.float64)
    weight = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *slices)
    return weight, measure_layer(path, weight, bias, rule, *squares)


def abstract_quantized(build: Callable[[], M], recipe: Recipe) -> M:
    """Return the quantized model with shapes in place of arrays; nothing is allocated.

    Args:
      build: makes the 16-bit model; only traced.
      recipe: as for `quantize_model`.

    Raises:
      ValueError: a rule matches nothing; it is named.
    """
    return _quantize_shapes(nnx.eval_shape(build), recipe)


def _quantize_shapes(model: M, recipe: Recipe) -> M:
    """Do what `quantize_model` does, in place, to a model with shapes in place of arrays."""
    for _, parent, name, rule in _plan(model, recipe):
        linear = _child(parent, name)
        weight = abstract_weight(linear.kernel.get_value(), rule.weight)
        _set_child(parent, name, QuartzLinear(weight, linear.bias, rule.activation))
    return model


def linears(model: nnx.Module) -> dict[str, nnx.Linear]:
    """Return the linears of a model by path, such as "double_blocks.0.img_attn.qkv"."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and path
    }


def replace_linears(
    model: M,
    replace: Callable[[str, nnx.Linear], nnx.Module],
    only: Container[str] | None = None,
) -> M:
    """Return a copy of a model with replace(path, linear) in the place of each linear.

    Args:
      model: is untouched; the copy shares its arrays.
      replace: is called in the order of the paths that `linears` gives.
      only: paths to replace; None for all.
    """
    model = nnx.clone(model)
    modules = dict(nnx.iter_modules(model))
    for path, linear in modules.items():
        name = ".".join(map(str, path))
        if isinstance(linear, nnx.Linear) and path and (only is None or name in only):
            _set_child(modules[path[:-1]], path[-1], replace(name, linear))
    return model


def round_parameters(model: M) -> M:
    """Round the parameters that a model still has to bfloat16 values, in place; return it."""
    nnx.update(model, jax.tree.map(round_to_bf16, nnx.state(model, nnx.Param)))
    return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a model, quantized and stored at once: a block, or all outside of blocks."""

    name: str  # such as "double_blocks.0"
    params: dict[str, jax.ShapeDtypeStruct]  # of the 16-bit model, by dotted path
    layers: dict[str, Rule]  # the linears to quantize, by dotted path
    arrays: dict[str, jax.ShapeDtypeStruct]  # as stored, by dotted path

    @property
    def bytes(self) -> int:
        """Bytes as stored."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in self.arrays.values())

    @property
    def bytes_bf16(self) -> int:
        """Bytes in 16 bits."""
        return 2 * sum(math.prod(x.shape) for x in self.params.values())

    def quantize(
        self, params: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, np.ndarray], list[LayerReport]]:
        """Return the arrays as stored, and a report of each layer.

        Args:
          params: of the 16-bit model, by dotted path, kernels [k, n].

        Raises:
          WeightError: a weight holds a NaN or an infinity; its layer is named.
        """
        arrays, reports = {}, []
        for path, rule in self.layers.items():
            bias = params.get(f"{path}.bias")
            weight, report = quantize_layer(path, params[f"{path}.kernel"], bias, rule)
            reports.append(report)
            for leaf, value in jax.tree_util.tree_leaves_with_path(weight):
                arrays[f"{path}.weight.{_name(leaf)}"] = np.asarray(value)
        for name in self.arrays.keys() - arrays.keys():
            arrays[name] = np.asarray(params[name]).astype(ml_dtypes.bfloat16)
        return arrays, reports


def plan_parts(model: nnx.Module, recipe: Recipe) -> list[Part]:
    """Return the parts of a model, in its order; nothing is allocated.

    Args:
      model: the 16-bit model with shapes in place of arrays, as `nnx.eval_shape` gives it.
      recipe: as for `quantize_model`.

    Raises:
      ValueError: a rule matches nothing; it is named.
    """
    tables = {
        "params": stored_arrays(nnx.state(model)),
        "layers": {path: rule for path, _, _, rule in _plan(model, recipe)},
        "arrays": stored_arrays(nnx.state(_quantize_shapes(nnx.clone(model), recipe))),
    }
    names = sorted(set(map(part_of, tables["params"])), key=_natural_order)
    parts = {name: {key: {} for key in tables} for name in names}
    for key, table in tables.items():
        for path, value in table.items():
            parts[part_of(path)][key][path] = value
    return [Part(name=name, **part) for name, part in parts.items()]


def part_of(path: str) -> str:
    """Return the part that a parameter or layer belongs to: its block, or "other"."""
    first, _, rest = path.partition(".")
    index = rest.partition(".")[0]
    return f"{first}.{index}" if index.isdigit() else _OTHER


def stored_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """Return arrays by dotted path as stored: parameters in bfloat16, quantized weights as are."""

    def stored(state: nnx.State) -> dict[str, jax.Array]:
        packed, rest = nnx.split_state(state, QuantizedWeight, ...)
        rest = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rest)
        tree = nnx.to_pure_dict(nnx.merge_state(packed, rest))
        return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    return jax.eval_shape(stored, state) if abstract else stored(state)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _natural_order(name: str) -> tuple[str, int]:
    first, _, index = name.partition(".")
    return first, int(index or 0)


def _plan(model: nnx.Module, recipe: Recipe) -> list[tuple[str, nnx.Module, str | int, Rule]]:
    """Path, parent, name in the parent and rule of every linear to quantize."""
    modules = dict(nnx.iter_modules(model))
    paths = {
        ".".join(map(str, path)): path
        for path, module in modules.items()
        if isinstance(module, nnx.Linear) and path
    }
    return [
        (path, modules[paths[path][:-1]], paths[path][-1], rule)
        for path, rule in recipe.assign(paths).items()
        if rule.weight.kind != "bf16"
    ]


def _child(parent: nnx.Module, name: str | int) -> nnx.Module:
    return parent[name] if isinstance(name, int) else getattr(parent, name)


def _set_child(parent: nnx.Module, name: str | int, child: nnx.Module) -> None:
    if isinstance(name, int):
        parent[name] = child
    else:
        setattr(parent, name, child)
