"""What quantizing a model did to each layer: error, size and use of the shifts."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import codec
from quartz_jax.formats.storage import dequantize
from quartz_jax.formats.tensors import IntTensor, QuartzTensor
from quartz_jax.recipes.recipe import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized linear."""

    path: str  # of the layer in the model
    weight: str  # format of the weight, in words
    activation: str  # format of the input, in words
    relative_error: float  # norm(weight - dequantized) / norm(weight), of the 16-bit weight
    elements: int  # of the weight
    weight_bytes: int  # as stored: codes, shifts and scales
    bias_bytes: int  # 16-bit
    # groups a stored shift (or integer step less one), from 0 up; None where there are no groups
    shifts: tuple[int, ...] | None

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict`, after JSON."""
        return cls(**value | {"shifts": value["shifts"] and tuple(value["shifts"])})

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
            f"{self.bytes:,} bytes, {self.bytes / max(self.bytes_bf16, 1):.3f} of bf16; "
            f"{self.weight_bits:.2f} bits a quantized weight, relative error "
            f"{self.relative_error:.4f}"
        )
        return "\n".join(lines)

    def table(self) -> str:
        """Return the report as aligned text, a line a layer and three lines of totals."""
        rows = [("layer", "weight", "input", "error", "bytes", "of bf16", "shifts, %")]
        for x in self.layers:
            numbers = (f"{x.relative_error:.4f}", f"{x.bytes:,}", f"{x.bytes / x.bytes_bf16:.3f}")
            rows.append((x.path, x.weight, x.activation, *numbers, _shares(x.shifts)))
        other, total = f"{self.other_bytes:,}", f"{self.bytes:,}"
        ratio = f"{self.bytes / max(self.bytes_bf16, 1):.3f}"
        rows.append(("everything else", "bf16", "bf16", "", other, "1.000", ""))
        rows.append(("total", "", "", f"{self.relative_error:.4f}", total, ratio, ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        right = (False, False, False, True, True, True, False)  # numbers are aligned to the right
        return "\n".join(
            "  ".join(
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in rows
        )

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ValueError for anything else."""
        try:
            layers = [LayerReport.from_json(layer) for layer in value["layers"]]
            report = cls(
                recipe=value["recipe"], layers=tuple(layers), other_bytes=value["other_bytes"]
            )
            if report.bytes != value["bytes"]:
                raise ValueError("report: the layers' bytes don't add up to the total")
        except (KeyError, TypeError) as error:
            raise ValueError(f"report is malformed: {error!r}") from None
        return report

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object with every field and the totals."""
        totals = {
            name: getattr(self, name)
            for name in ("bytes", "bytes_bf16", "relative_error", "weight_bits")
        }
        return dataclasses.asdict(self) | totals


def measure_layer(
    path: str,
    weight: QuartzTensor | IntTensor,  # [n, k]
    bias: jax.Array | nnx.Param | None,  # [n]
    rule: Rule,
    squared_error: float,  # sums over the weight, see `squared_norms`
    squared_weight: float,
) -> LayerReport:
    """Describe a quantized layer."""
    return LayerReport(
        path=path,
        weight=str(rule.weight),
        activation=str(rule.activation),
        relative_error=float(np.sqrt(squared_error / (squared_weight or 1))),
        elements=weight.size,
        weight_bytes=weight.nbytes,
        bias_bytes=0 if bias is None else 2 * bias.size,
        shifts=_count_shifts(weight) if isinstance(weight, QuartzTensor) else None,
    )


@jax.jit
def squared_norms(
    kernel: jax.Array,  # [k, n]
    weight: QuartzTensor | IntTensor,  # [n, k]
) -> tuple[jax.Array, jax.Array]:
    """Return the squared norms of what quantizing changed and of the bfloat16 kernel itself."""
    exact = kernel.T.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.sum((dequantize(weight) - exact) ** 2), jnp.sum(exact**2)


def _count_shifts(weight: QuartzTensor) -> tuple[int, ...]:
    groups = -(-weight.k // weight.config.group_size)
    shifts = np.asarray(codec.unpack(weight.shifts, signed=False))[..., :groups]
    kinds = 5 if weight.config.step == "power" else 16
    return tuple(np.bincount(shifts.ravel(), minlength=kinds).tolist())


def _shares(shifts: tuple[int, ...] | None) -> str:
    total = sum(shifts or ())
    return " ".join(f"{100 * count / total:.0f}" for count in shifts) if total else ""
