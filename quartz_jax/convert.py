"""Applying a recipe to a model, layer by layer."""

from collections.abc import Callable, Container
from typing import TypeVar

import jax
from flax import nnx
from tqdm import tqdm

from quartz_jax.linear import QuartzLinear, abstract_weight, encode_weight, round_to_bf16
from quartz_jax.recipe import Recipe, Rule
from quartz_jax.report import Report, measure_layer

M = TypeVar("M", bound=nnx.Module)


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
        weight = encode_weight(path, linear.kernel.get_value(), rule.weight)
        layers.append(measure_layer(path, linear, weight, rule))
        _set_child(parent, name, QuartzLinear(weight, linear.bias, rule.activation))
    nnx.update(model, jax.tree.map(round_to_bf16, nnx.state(model, nnx.Param)))
    other = 2 * elements - sum(layer.bytes_bf16 for layer in layers)
    return model, Report(recipe=recipe.name, layers=tuple(layers), other_bytes=other)


def abstract_quantized(build: Callable[[], M], recipe: Recipe) -> M:
    """Return the quantized model with shapes in place of arrays; nothing is allocated.

    Args:
      build: makes the 16-bit model; only traced.
      recipe: as for `quantize_model`.

    Raises:
      ValueError: a rule matches nothing; it is named.
    """
    model = nnx.eval_shape(build)
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
