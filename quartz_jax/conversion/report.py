"""What quantizing a model did to each layer: error, size and use of the shifts."""

import dataclasses
from typing import Any, Self

import jax
import numpy as np

from pallas_kernels import codec
from quartz_jax import schema
from quartz_jax.engine.linear import how_it_runs
from quartz_jax.formats import PackedRows, Stored
from quartz_jax.recipes.recipe import LayerRecipe
from quartz_jax.transforms import Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized linear."""

    path: str  # of the layer in the model
    weight: str  # transforms, rounding and format of the weight, in words
    activation: str  # format of the input, in words
    relative_error: float  # norm(weight - dequantized) / norm(weight), of the 16-bit weight
    elements: int  # of the weight
    weight_bytes: int  # as stored: codes, steps, scales, and what ops hold
    bias_bytes: int  # 16-bit
    # groups a stored shift (or integer step less one), from 0 up; None where there are no groups
    shifts: tuple[int, ...] | None = None
    role: str = "linear"  # of the layer in its model
    execution: str = "int8"  # how it computes: `engine.linear.how_it_runs`
    input_bits: float = 16.0  # stored bits an element of the input, scales included
    # the same error of the output on calibration inputs; None where none were seen
    output_error: float | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the layer as stored."""
        return self.weight_bytes + self.bias_bytes

    @property
    def bytes_bf16(self) -> int:
        """Bytes of the layer in 16 bits."""
        return 2 * self.elements + self.bias_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A quantized model."""

    recipe: str  # name of the recipe
    layers: tuple[LayerReport, ...]  # the quantized linears, in the model's order
    other_bytes: int  # of everything that stays 16-bit

    @property
    def bytes(self) -> int:
        """Bytes of the whole model as stored."""
        return self.other_bytes + sum(layer.bytes for layer in self.layers)

    @property
    def bytes_bf16(self) -> int:
        """Bytes of the whole model in 16 bits."""
        return self.other_bytes + sum(layer.bytes_bf16 for layer in self.layers)

    @property
    def relative_error(self) -> float:
        """Mean of the layers' relative weight errors; 0 without quantized layers."""
        return sum(layer.relative_error for layer in self.layers) / max(len(self.layers), 1)

    @property
    def weight_bits(self) -> float:
        """Stored bits an element over the quantized weights; 16 without any."""
        elements = sum(layer.elements for layer in self.layers)
        stored = sum(layer.weight_bytes for layer in self.layers)
        return 8 * stored / elements if elements else 16.0

    def summary(self) -> str:
        """Return a line a pair of formats and one of totals."""
        kinds: dict[tuple[str, str], list[LayerReport]] = {}
        for layer in self.layers:
            kinds.setdefault((layer.weight, layer.activation), []).append(layer)
        lines = [
            f"{len(layers)} layers with {weight} weights and {activation} inputs: "
            f"{sum(layer.bytes for layer in layers):,} bytes"
            for (weight, activation), layers in kinds.items()
        ]
        lines.append(f"everything else in bf16: {self.other_bytes:,} bytes")
        lines.append(
            f"{self.bytes:,} bytes in memory, {self.bytes / max(self.bytes_bf16, 1):.3f} of bf16; "
            f"{self.weight_bits:.2f} bits a quantized weight, relative error "
            f"{self.relative_error:.4f}"
        )
        return "\n".join(lines)

    def table(self) -> str:
        """Return the report as aligned text, a line a layer and three lines of totals."""
        rows = [("layer", "weight", "input", "error", "bytes", "of bf16", "runs", "shifts, %")]
        for x in self.layers:
            numbers = (f"{x.relative_error:.4f}", f"{x.bytes:,}", f"{x.bytes / x.bytes_bf16:.3f}")
            rows.append((x.path, x.weight, x.activation, *numbers, x.execution, _shares(x.shifts)))
        other, total = f"{self.other_bytes:,}", f"{self.bytes:,}"
        ratio = f"{self.bytes / max(self.bytes_bf16, 1):.3f}"
        rows.append(("everything else", "bf16", "bf16", "", other, "1.000", "", ""))
        rows.append(("total", "", "", f"{self.relative_error:.4f}", total, ratio, "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = (
            False,
            False,
            False,
            True,
            True,
            True,
            False,
            False,
        )  # numbers are aligned to the right
        return "\n".join(
            "  ".join(
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in rows
        )

    @property
    def input_bits(self) -> float:
        """Stored bits an element of the quantized inputs, mean over layers; 16 without any."""
        bits = [layer.input_bits for layer in self.layers if layer.execution != "weight-only"]
        return sum(bits) / len(bits) if bits else 16.0

    @property
    def execution(self) -> str:
        """How the layers compute: the ways, without weight-only ones unless all are."""
        ways = dict.fromkeys(layer.execution for layer in self.layers)
        found = [way for way in ways if way != "weight-only"] or list(ways)
        return ", ".join(found) or "bf16"

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Undo `to_json`, of earlier versions too; raises ValueError for anything else."""
        if not isinstance(value, dict) or "bytes" not in value:
            raise ValueError("report is malformed; it must be a JSON object with its totals")
        fields = {field.name for field in dataclasses.fields(cls)}
        report = schema.from_json(cls, {key: value[key] for key in fields if key in value})
        if report.bytes != value["bytes"]:
            raise ValueError("report: the layers' bytes don't add up to the total")
        return report

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with every field and the totals."""
        names = ("bytes", "bytes_bf16", "relative_error", "weight_bits", "input_bits", "execution")
        return schema.to_json(self) | {name: getattr(self, name) for name in names}


def measure_layer(
    path: str,
    weight: Stored,  # [n, k]
    ops: tuple[Op, ...],
    bias: Any,  # [n] or None
    recipe: LayerRecipe,
    squares: np.ndarray,  # [4]: see `conversion.model`
) -> LayerReport:
    """Describe a quantized layer."""
    error, exact, output_error, output = squares
    activation = recipe.activation
    return LayerReport(
        path=path,
        weight=recipe.words(),
        activation=recipe.input_words(),
        relative_error=float(np.sqrt(error / (exact or 1))),
        elements=weight.size,
        weight_bytes=weight.nbytes + sum(x.nbytes for x in jax.tree.leaves(ops)),
        bias_bytes=0 if bias is None else 2 * bias.size,
        shifts=_count_shifts(weight) if isinstance(weight, PackedRows) else None,
        execution=how_it_runs(weight, activation),
        input_bits=16.0 if activation is None else activation.bits(weight.k) + 4 * recipe.wide,
        output_error=float(np.sqrt(output_error / output)) if output else None,
    )


def _count_shifts(weight: PackedRows) -> tuple[int, ...]:
    groups = -(-weight.k // weight.group_size)
    shifts = np.asarray(codec.unpack(weight.shifts, signed=False))[..., :groups]
    kinds = 5 if weight.step == "power" else 16
    return tuple(np.bincount(shifts.ravel(), minlength=kinds).tolist())


def _shares(shifts: tuple[int, ...] | None) -> str:
    total = sum(shifts or ())
    if not shifts or not total:
        return ""
    return " ".join(f"{100 * count / total:.0f}" for count in shifts)
