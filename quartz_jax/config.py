"""How one tensor is quantized."""

import dataclasses
from typing import Any

from pallas_kernels.arguments import check_choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuartzConfig:
    """The variant of the QuaRTZ number format (arXiv 2509.26436) that one tensor uses.

    Raises:
      ValueError: a value outside those listed, or a combination that the format excludes.
    """

    group_size: int = 16  # elements along the contraction axis that share a shift: 8, 16, 32, 64
    rounding: str = "nearest"  # "nearest", or "truncate" as the paper's text has it
    range: str = "absmax"  # "absmax" is symmetric, "minmax" asymmetric for one-sided data
    step: str = "power"  # of a group: a power of two, or "integer", an extension of the paper
    scale_block: int | None = None  # elements that share a scale; None for the whole row

    def __post_init__(self):
        check_choices(
            group_size=self.group_size, rounding=self.rounding, range=self.range, step=self.step
        )
        block = self.scale_block
        if block is not None and (type(block) is not int or block < 1 or block % self.group_size):
            raise ValueError(
                f"scale_block is {block!r}; it must be None or a positive multiple of "
                f"group_size={self.group_size}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "QuartzConfig":
        """Undo `to_json`; absent fields take their defaults.

        Raises:
          ValueError: not an object, an unknown field, or a value that the constructor refuses.
        """
        if not isinstance(value, dict):
            raise ValueError(f"QuartzConfig is {value!r}; it must be a JSON object")
        unknown = sorted(set(value) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"QuartzConfig has unknown fields {', '.join(unknown)}; remove them")
        return cls(**value)
