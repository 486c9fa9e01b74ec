"""Applying a recipe to a model, layer by layer: one in memory, or one that is read as it goes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from pallas_kernels.sharding import in_jax_defaults, put_on
from quartz_jax.conversion.report import LayerReport, Report, measure_layer
from quartz_jax.engine.attention import is_attention
from quartz_jax.engine.convolution import QuantizedConv
from quartz_jax.engine.linear import QuantizedLinear
from quartz_jax.engine.surgery import replace_layers
from quartz_jax.formats import Stored
from quartz_jax.formats.storage import WeightError, check_finite, dequantize
from quartz_jax.recipes.recipe import LayerRecipe, Recipe
from quartz_jax.recipes.sites import (
    Site,
    block_of,
    is_conv,
    sites,
    sizes,
    weight_rows,
    window_of,
)
from quartz_jax.rounding import Nearest
from quartz_jax.transforms import Layer, Op, Seen, TurnedRows
from quartz_jax.transforms.base import HIGHEST

M = TypeVar("M", bound=nnx.Module)

# Elements of a weight that are quantized at once where its rows don't depend on each other: the
# codec's float32 and int32 intermediates then stay in a CPU's cache, which is twice as fast, and
# small beside the model.
_ELEMENTS_AT_ONCE = 2**22
# Part of a model that holds what lies in no list of blocks: embedders, the last layer.
OTHER = "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a layer becomes."""

    weight: Stored  # [n, k]
    ops: tuple[Op, ...]

    def on_mesh_of(self, kernel: Any) -> "Fitted":
        """Return it on the mesh of a kernel [..., k, n], if that is on one, sharded alike."""
        sharding = getattr(kernel, "sharding", None)
        if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
            return self
        spec = (*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec)))
        k_axes, n_axes = spec[-2:]
        weight = put_on(sharding.mesh, (n_axes, k_axes), self.weight)
        return Fitted(weight=weight, ops=put_on(sharding.mesh, (), self.ops))

    def bias(self, bias: nnx.Param | None) -> nnx.Param | None:
        """Return what becomes of the linear's bias; shapes in place of arrays stay so."""
        value = None if bias is None else bias.get_value()
        if value is None or isinstance(value, jax.ShapeDtypeStruct):
            return bias
        turned = self.turned(value)
        return bias if turned is value else nnx.Param(turned)

    def turned(self, bias: Any) -> Any:
        """Return a bias [n], rotated where the rows of the weight are, in bfloat16 values."""
        op = next((op for op in self.ops if isinstance(op, TurnedRows)), None)
        if op is None:
            return bias
        exact = round_to_bf16(jnp.asarray(bias)).astype(jnp.float32)
        return round_to_bf16(op.turned(exact)).astype(bias.dtype)

    def module(self, layer: nnx.Linear | nnx.Conv, recipe: LayerRecipe) -> QuantizedLinear:
        """Return the module that takes the place of a linear or convolution."""
        given = self.weight, self.bias(layer.bias), recipe.activation, self.ops
        options: dict[str, Any] = {"dtype": layer.dtype, "role": getattr(layer, "role", None)}
        if is_conv(layer):
            return QuantizedConv(*given, window=window_of(layer), **options)
        return QuantizedLinear(*given, **options)


def quantize_model(
    model: M,
    recipe: Recipe,
    seen: Mapping[str, Seen] | None = None,
    *,
    progress: bool = False,
) -> tuple[M, Report]:
    """Return a copy of a model whose layers are quantized by a recipe, and a report.

    The given model is untouched; the copy shares its arrays. Everything that stays 16-bit is
    rounded to bfloat16 values (in the dtype it has), which is what a checkpoint stores: the result
    is the same before saving and after loading, whatever dtype the model computes in.

    Args:
      model: any NNX model with nnx.Linear or nnx.Conv layers.
      recipe: its rules decide by the layers' roles or paths; models that state no roles have
        linears of the role "linear", and convolutions that only a path or kind names.
      seen: what `engine.observe.observe` found of the layers' inputs, by path; needed by recipes
        that are calibrated.
      progress: show a bar over the layers on stderr.

    Raises:
      ValueError: a rule matches nothing, or a layer that can't be quantized; a weight holds a NaN
        or an infinity; statistics are missing; or the model is being traced. The layer is named.
    """
    assigned = recipe.assign(sites(model))
    check_seen(recipe, assigned, seen)
    elements = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    layers: list[LayerReport] = []
    bar = tqdm(total=len(assigned), desc="quantizing", disable=not progress)

    def replace(path: str, linear: Any) -> nnx.Module:
        kernel = linear.kernel.get_value()
        if isinstance(kernel, jax.core.Tracer):
            raise ValueError(
                f"weight of {path} is traced, as under jax.jit or eval_shape; quantize_model works "
                "on arrays, abstract_quantized gives shapes"
            )
        fitted, report = quantize_layer(
            path,
            weight_rows(np.asarray(kernel)),
            linear.bias,
            assigned[path],
            (seen or {}).get(path),
        )
        layers.append(report)
        bar.update()
        fitted = fitted.on_mesh_of(kernel)
        return fitted.module(linear, assigned[path])

    with bar:
        quantized = replace_layers(model, replace, only=assigned)
    nnx.update(quantized, jax.tree.map(round_to_bf16, nnx.state(quantized, nnx.Param)))
    set_attention(quantized, recipe)
    other = 2 * elements - sum(layer.bytes_bf16 for layer in layers)
    roles = {site.path: site.role for site in sites(model)}
    layers = [dataclasses.replace(layer, role=roles[layer.path]) for layer in layers]
    return quantized, Report(recipe=recipe.name, layers=tuple(layers), other_bytes=other)


def check_seen(
    recipe: Recipe, assigned: Mapping[str, LayerRecipe], seen: Mapping[str, Seen] | None
) -> None:
    """Raise ValueError unless the statistics are there that a recipe's layers read."""
    for path, layer in assigned.items():
        found = seen[path].needs if seen and path in seen else frozenset()
        if missing := layer.needs - found:
            raise ValueError(
                f"recipe {recipe.name!r} is calibrated: {path} needs "
                f"{', '.join(sorted(missing))} of its inputs; give what observe found, or convert "
                "with calibration prompts"
            )


def quantize_layer(
    path: str,
    weight: jax.Array | np.ndarray,  # [n, k]
    bias: Any,  # [n] or None: only counted
    recipe: LayerRecipe,
    seen: Seen | None = None,
) -> tuple[Fitted, LayerReport]:
    """Quantize the weight of one layer, and measure what it did.

    Weights whose rows don't depend on each other go some rows at a time.

    Raises:
      WeightError: it holds a NaN or an infinity, or would in bfloat16; names the layer.
    """
    n, k = weight.shape
    assert recipe.weight is not None
    rows = n
    plain = not (recipe.transforms or recipe.wide) and recipe.rounding == Nearest()
    if recipe.weight.rows_apart and plain:
        rows = 2 ** int(math.log2(max(_ELEMENTS_AT_ONCE // k, 1)))
    slices, squares = [], np.zeros(4)
    for start in range(0, n, rows):
        part = jnp.asarray(weight[start : start + rows])
        check_finite(path, part.astype(jnp.bfloat16))
        try:
            with in_jax_defaults():
                *made, measured = _fit_and_store(part, recipe, seen or Seen())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        slices.append(made)
        squares += np.asarray(measured, np.float64)
    stored, ops = jax.tree.map(lambda *leaves: _joined(leaves), *slices)
    fitted = Fitted(weight=stored, ops=ops)
    return fitted, measure_layer(path, stored, ops, bias, recipe, squares)


def _joined(leaves: tuple[jax.Array, ...]) -> jax.Array:
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)


@functools.partial(jax.jit, static_argnums=1)
def _fit_and_store(
    weight: jax.Array,  # [n, k]
    recipe: LayerRecipe,
    seen: Seen,
) -> tuple[Stored, tuple[Op, ...], jax.Array]:
    """Return the stored weight, the ops, and squared norms of what rounding did.

    These are float32 [4]: of the error and of the weight itself, then of the error's and the
    weight's output on what the layer has seen, 0 where there is no Gram matrix.
    """
    exact = round_to_bf16(weight).astype(jnp.float32)
    layer = recipe.fit(Layer(weight=exact, seen=seen))
    stored = recipe.store(layer)
    error = dequantize(stored) - layer.weight
    outputs = [jnp.float32(0)] * 2
    if layer.seen.gram is not None:
        outputs = [_output_norm(x, layer.seen.gram) for x in (error, layer.weight)]
    for op in reversed(layer.ops):
        error = op.back(error)
    norms = [jnp.sum(x**2) for x in (error, exact)]
    return stored, layer.ops, jnp.stack([*norms, *outputs])


def _output_norm(weight: jax.Array, gram: jax.Array) -> jax.Array:
    """Return the mean squared norm of x w^T over the inputs whose Gram matrix is given."""
    return jnp.sum(jnp.matmul(weight, gram, precision=HIGHEST) * weight)


def round_to_bf16(x: jax.Array) -> jax.Array:
    """Return floating values rounded to bfloat16, in the dtype they have; others as they are."""
    return x.astype(jnp.bfloat16).astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def abstract_quantized(build: Callable[[], M], recipe: Recipe) -> M:
    """Return the quantized model with shapes in place of arrays; nothing is allocated.

    Args:
      build: makes the 16-bit model; only traced.
      recipe: as for `quantize_model`.

    Raises:
      ValueError: a rule matches nothing, or a layer doesn't fit its recipe; it is named.
    """
    return quantize_shapes(nnx.eval_shape(build), recipe)


def quantize_shapes(model: M, recipe: Recipe) -> M:
    """Do what `quantize_model` does to a model with shapes in place of arrays."""
    assigned = recipe.assign(sites(model))

    def replace(path: str, linear: Any) -> nnx.Module:
        try:
            fitted = _abstract_layer(assigned[path], *sizes(linear))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return fitted.module(linear, assigned[path])

    quantized = replace_layers(model, replace, only=assigned)
    set_attention(quantized, recipe)
    return quantized


def check_unplaced(model: nnx.Module, recipe: Recipe, report: Report) -> None:
    """Raise ValueError unless a quantized model's weights are as its recipe stores them.

    Those of a placed one may not be, even on a device without kernels; loading would miss them.

    Args:
      model: the quantized model.
      recipe: that it was quantized with.
      report: that `quantize_model` returned.
    """
    roles = {layer.path: layer.role for layer in report.layers}
    for keys, module in nnx.iter_modules(model):
        if not isinstance(module, QuantizedLinear):
            continue
        path, weight = ".".join(map(str, keys)), module.weight.get_value()
        n, k = weight.shape
        role = roles.get(path, "linear")
        site = Site(path=path, kind=module.kind, n=n, k=k, block=block_of(path), role=role)
        layer = next((rule.layer for rule in recipe.rules if rule.match(site)), LayerRecipe())
        expected = _abstract_layer(layer, n, k).weight if layer.weight else None
        if _layout(weight) != _layout(expected):
            raise ValueError(
                f"{path} isn't stored as recipe {recipe.name!r} has it: the model is placed, or of "
                "another recipe; give the model that quantize_model returned, with its recipe"
            )


def check_folded(model: nnx.Module, report: Report) -> None:
    """Raise ValueError unless rotations are folded into the layers that they were folded into.

    Which those are the model says, and its arrays don't: an edition of it that says otherwise
    would multiply what isn't rotated.
    """
    now = {
        ".".join(map(str, keys))
        for keys, module in nnx.iter_modules(model)
        if isinstance(module, QuantizedLinear) and module.folded
    }
    then = {x.path for x in report.layers if {"folded", "turned"} & {*x.weight.split()}}
    if differing := sorted(now ^ then):
        was, by_now = ("had a", "has none") if differing[0] in then else ("had no", "has one")
        raise ValueError(
            f"{differing[0]} {was} rotation folded into it when the checkpoint was written, and "
            f"{by_now} by what the model states now; quantize again"
        )


def _layout(tree: Any) -> Any:
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def set_attention(model: nnx.Module, recipe: Recipe) -> None:
    """Note with a model's attention, in place, what a recipe has it read; `place` sees to it."""
    for _, module in nnx.iter_modules(model):
        if is_attention(module):
            module.attention_format = recipe.attention


@functools.lru_cache(maxsize=256)
def _abstract_layer(recipe: LayerRecipe, n: int, k: int) -> Fitted:
    shapes: dict[str, tuple[int, ...]] = {
        "rows": (1, 1, k),
        "absmax": (k,),
        "mean": (k,),
        "gram": (k, k),
    }
    shape: Any = jax.ShapeDtypeStruct  # stands where an array would
    seen = Seen(**{name: shape(shapes[name], jnp.float32) for name in recipe.needs})
    weight = jax.ShapeDtypeStruct((n, k), jnp.bfloat16)

    def fit(weight, seen):
        layer = recipe.fit(Layer(weight=weight.astype(jnp.float32), seen=seen))
        return recipe.store(layer), layer.ops

    with in_jax_defaults():
        stored, ops = jax.eval_shape(fit, weight, seen)
    return Fitted(weight=stored, ops=ops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of a model, quantized and stored at once: a block, or all outside of blocks."""

    name: str  # such as "double_blocks.0"
    params: dict[str, jax.ShapeDtypeStruct]  # of the 16-bit model, by dotted path
    layers: dict[str, LayerRecipe]  # the layers to quantize, by dotted path
    roles: dict[str, str]  # of those layers in the model
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
        self, params: Mapping[str, np.ndarray], seen: Mapping[str, Seen] | None = None
    ) -> tuple[dict[str, np.ndarray], list[LayerReport]]:
        """Return the arrays as stored, and a report of each layer.

        Args:
          params: of the 16-bit model, by dotted path, kernels [k, n] or [rows, columns, channels,
            n].
          seen: statistics of the layers' inputs, by path; for calibrated recipes.

        Raises:
          WeightError: a parameter holds a NaN or an infinity; it is named.
        """
        arrays, reports = {}, []
        for path, recipe in self.layers.items():
            fitted, report = quantize_layer(
                path,
                weight_rows(params[f"{path}.kernel"]),
                params.get(f"{path}.bias"),
                recipe,
                (seen or {}).get(path),
            )
            reports.append(dataclasses.replace(report, role=self.roles[path]))
            if (name := f"{path}.bias") in self.arrays:
                bias = np.asarray(fitted.turned(params[name]))
                arrays[name] = _as_stored(name, bias, self.arrays[name].dtype)
            for prefix, tree in (("weight", fitted.weight), ("ops", fitted.ops)):
                for leaf, value in jax.tree_util.tree_leaves_with_path(tree):
                    arrays[f"{path}.{prefix}.{leaf_name(leaf)}"] = np.asarray(value)
        for name in self.arrays.keys() - arrays.keys():
            arrays[name] = _as_stored(name, np.asarray(params[name]), self.arrays[name].dtype)
        return arrays, reports


def _as_stored(name: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Return a parameter that isn't quantized in the dtype that is stored."""
    stored = array.astype(dtype)
    if dtype == ml_dtypes.bfloat16 and not np.isfinite(stored.astype(np.float32)).all():
        raise WeightError(f"{name} holds NaN or infinity in bfloat16; check the checkpoint")
    return stored


def plan_parts(model: nnx.Module, recipe: Recipe) -> list[Part]:
    """Return the parts of a model, in its order; nothing is allocated.

    Args:
      model: the 16-bit model with shapes in place of arrays, as `nnx.eval_shape` gives it.
      recipe: as for `quantize_model`.

    Raises:
      ValueError: a rule matches nothing; it is named.
    """
    found = sites(model)
    assigned = recipe.assign(found)
    tables: dict[str, dict[str, Any]] = {
        "params": stored_arrays(nnx.state(model)),
        "layers": assigned,
        "roles": {site.path: site.role for site in found if site.path in assigned},
        "arrays": stored_arrays(nnx.state(quantize_shapes(model, recipe))),
    }
    names = sorted(set(map(part_of, tables["params"])), key=_natural_order)
    parts: dict[str, dict[str, Any]] = {name: {key: {} for key in tables} for name in names}
    for key, table in tables.items():
        for path, value in table.items():
            parts[part_of(path)][key][path] = value
    return [Part(name=name, **part) for name, part in parts.items()]


def part_of(path: str) -> str:
    """Return the part that a parameter or layer belongs to: its block, or "other"."""
    first, _, rest = path.partition(".")
    index = rest.partition(".")[0]
    return f"{first}.{index}" if index.isdigit() else OTHER


def stored_arrays(state: nnx.State) -> dict[str, jax.Array]:
    """Return arrays by dotted path as stored: float parameters in bfloat16, all else as it is."""

    def stored(state: nnx.State) -> dict[str, jax.Array]:
        params, rest = nnx.split_state(state, nnx.Param, ...)
        params = jax.tree.map(_param_as_stored, params)
        tree = nnx.to_pure_dict(nnx.merge_state(params, rest))
        return {leaf_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}

    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state))
    return jax.eval_shape(stored, state) if abstract else stored(state)


def _param_as_stored(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x


def leaf_name(path: tuple) -> str:
    """Return a path of a pytree as dotted names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _natural_order(name: str) -> tuple[str, int]:
    first, _, index = name.partition(".")
    return first, int(index or 0)
