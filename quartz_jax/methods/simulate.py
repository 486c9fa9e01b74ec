"""Applying a method to a model: linears whose operands have the values that storage leaves them."""

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from quartz_jax.conversion.model import linears, replace_linears, round_parameters
from quartz_jax.conversion.report import LayerReport, Report
from quartz_jax.engine.linear import round_to_bf16
from quartz_jax.engine.observe import LayerStatistics, whole_input
from quartz_jax.formats import NumberFormat
from quartz_jax.formats.storage import check_finite
from quartz_jax.methods.recipe import LayerMethod, Method
from quartz_jax.transforms.transforms import Layer

_HIGHEST = jax.lax.Precision.HIGHEST


class SimulatedLinear(nnx.Module):
    """y = Q(T(x)) Q(W)^T + T(x) down up + bias, in float32, returned in the dtype of x."""

    def __init__(
        self,
        weight: jax.Array,  # float32 [n, k]: stored values
        bias: jax.Array | None,  # [n]
        steps: list[nnx.Module],  # what is done to the input first
        activation: NumberFormat | None,  # of the input behind them
        branch: tuple[jax.Array, jax.Array] | None = None,  # [k, rank] and [rank, n]
    ):
        self.weight = nnx.Variable(weight)
        self.bias = None if bias is None else nnx.Variable(bias)
        self.steps = nnx.List(steps)
        self.activation = activation
        self.branch = None if branch is None else nnx.List([nnx.Variable(x) for x in branch])

    def __call__(
        self,
        x: jax.Array | tuple,  # [..., k], or parts that lie side by side
        *,
        modulation: tuple[jax.Array, jax.Array] | None = None,  # shift and scale, [b, 1, k]
        activation: str | None = None,  # "gelu": its tanh form
        gate: jax.Array | None = None,  # [b, 1, n]
        residual: jax.Array | None = None,  # [..., n]
    ) -> jax.Array:
        """Return [..., n]: what `models.linear.Linear` does, quantized."""
        given = whole_input(x, modulation)
        y = self.product(given.astype(jnp.float32)).astype(given.dtype)
        if activation == "gelu":
            y = nnx.gelu(y, approximate=True)
        y = y if gate is None else gate * y
        return y if residual is None else residual + y

    def product(self, x: jax.Array) -> jax.Array:
        """Return the linear alone, float32 [..., n] from float32 [..., k]."""
        for step in self.steps:
            x = step(x)
        stored = x
        if self.activation is not None:
            # The scale, a block's step and the rounding must see the same numbers. Without the
            # barrier QuaRTZ's error grew by a quarter on an H100 (JAX 0.11.2), presumably since
            # XLA computes what comes before anew for each, in other roundings.
            x = jax.lax.optimization_barrier(x)
            stored = self.activation(x)
        y = jnp.einsum("...k,nk->...n", stored, self.weight.get_value(), precision=_HIGHEST)
        if self.branch is not None:
            down, up = (part.get_value() for part in self.branch)
            y = y + jnp.matmul(jnp.matmul(x, down, precision=_HIGHEST), up, precision=_HIGHEST)
        return y if self.bias is None else y + self.bias.get_value()


def simulate_model(
    model: nnx.Module,
    method: Method,
    statistics: dict[str, LayerStatistics] | None = None,
    *,
    progress: bool = False,
) -> tuple[nnx.Module, Report]:
    """Return a copy of a model whose linears follow a method, and a report.

    As `quantize_model`: everything that stays 16-bit is rounded to bfloat16 values, and the given
    model is untouched.

    Args:
      model: any NNX model with nnx.Linear layers.
      method: its rules decide by the linears' paths.
      statistics: what `record` returned for this model; needed by methods that are calibrated.
      progress: show a bar over the layers on stderr.

    Raises:
      ValueError: a rule matches nothing, a weight isn't finite, or statistics are missing.
    """
    if method.calibrated and statistics is None:
        raise ValueError(f"method {method.name!r} is calibrated; give it recorded statistics")
    found = linears(model)
    assigned = method.assign(found)
    elements = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    reports, bar = [], tqdm(total=len(assigned), desc=method.name, disable=not progress)

    def replace(path: str, linear: nnx.Linear) -> nnx.Module:
        seen = statistics[path] if method.calibrated else None
        simulated, report = simulate_linear(path, linear, assigned[path], seen)
        reports.append(report)
        bar.update()
        return simulated

    with bar:
        model = round_parameters(replace_linears(model, replace, only=assigned))
    other = 2 * elements - sum(report.bytes_bf16 for report in reports)
    return model, Report(recipe=method.name, layers=tuple(reports), other_bytes=other)


def simulate_linear(
    path: str,
    linear: nnx.Linear,
    method: LayerMethod,
    seen: LayerStatistics | None,
) -> tuple[SimulatedLinear, LayerReport]:
    """Return a linear that follows a method, and what that did to its weight."""
    kernel, bias = linear.kernel.get_value(), linear.bias and linear.bias.get_value()
    check_finite(path, kernel)
    exact = round_to_bf16(kernel).T.astype(jnp.float32)
    layer = Layer(
        weight=exact,
        bias=None if bias is None else round_to_bf16(bias).astype(jnp.float32),
        rows=None if seen is None else jnp.asarray(seen.rows),
        absmax=None if seen is None else jnp.asarray(seen.absmax),
    )
    steps = []
    for transform in method.transforms:
        step, layer = transform.fit(layer, method)
        steps += [] if step is None else [step]
    stored = method.rounding(layer.weight, layer.flat, method.weight)
    branch = None if layer.down is None else (layer.down, layer.up)
    simulated = SimulatedLinear(stored, layer.bias, steps, method.activation, branch)
    return simulated, _report(path, simulated, exact, layer.bias, method)


def bits_per_weight(method: LayerMethod, n: int, k: int) -> float:
    """Stored bits an element of a [n, k] weight, scales and the 16-bit branch included."""
    return method.weight.bits(k) + 16 * min(method.rank, n, k) * (n + k) / (n * k)


def _report(
    path: str,
    simulated: SimulatedLinear,
    exact: jax.Array,  # [n, k]
    bias: jax.Array | None,
    method: LayerMethod,
) -> LayerReport:
    n, k = exact.shape
    words = [type(t).__name__.lower() for t in (*method.transforms, method.rounding)]
    return LayerReport(
        path=path,
        weight=" ".join([*(w for w in words if w != "nearest"), str(method.weight)]),
        activation=str(method.activation or "bf16"),
        relative_error=_relative_error(simulated, exact),
        elements=exact.size,
        weight_bytes=round(bits_per_weight(method, n, k) * exact.size / 8),
        bias_bytes=0 if bias is None else 2 * n,
        shifts=None,
    )


def _relative_error(simulated: SimulatedLinear, exact: jax.Array, rows: int = 1024) -> float:
    """norm(effective - exact) / norm(exact), the weight read off by unit inputs, some at a time."""
    squared = 0.0
    if not simulated.steps and simulated.branch is None:
        squared = float(jnp.sum((simulated.weight.get_value() - exact) ** 2))
    else:
        graphdef, state = nnx.split(simulated)
        reader = nnx.merge(graphdef, state)
        reader.activation, zero = None, jnp.zeros((1, exact.shape[1]))
        offset = reader.product(zero)
        for start in range(0, exact.shape[1], rows):
            part = exact[:, start : start + rows]
            units = jax.nn.one_hot(start + jnp.arange(part.shape[1]), exact.shape[1])
            squared += float(jnp.sum((reader.product(units) - offset - part.T) ** 2))
    norm = float(jnp.linalg.norm(exact))
    return squared**0.5 / norm if norm else 0.0
