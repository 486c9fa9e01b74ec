"""QuaRTZ: 8 bits first, then 4 bits from the leading one of the largest magnitude in a group."""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import codec
from pallas_kernels.arguments import check_choices
from pallas_kernels.operands import PackedRows
from quartz_jax.formats.base import Format, Kept, Scales, check_block, join
from quartz_jax.schema import part


@part()
class Quartz(Format):
    """QuaRTZ (arXiv 2509.26436) as `pallas_kernels.codec` defines it.

    Raises:
      ValueError: a value outside those listed, or a combination that the format excludes.
    """

    # elements along the contraction axis that share a step; kernels have 8, 16, 32 and 64
    group_size: int = 16
    rounding: Literal["nearest", "truncate"] = "nearest"  # "truncate" as the paper's text has it
    range: Literal["absmax", "minmax"] = "absmax"  # "minmax" is asymmetric, for one-sided data
    step: Literal["power", "integer"] = "power"  # of a group; "integer" extends the paper
    levels: Literal["uniform", "stretched"] = "uniform"  # of a code, with an integer step
    search: bool = False  # choose integer steps by least squared error: for weights, offline
    scale_block: int | None = None  # elements that share an 8-bit scale; None for the whole row

    def __post_init__(self):
        check_block("group_size", self.group_size)
        check_choices(rounding=self.rounding, range=self.range, step=self.step, levels=self.levels)
        if self.search and self.step != "integer":
            raise ValueError("search is True; it needs step='integer'")
        block = self.scale_block
        if block is not None and (type(block) is not int or block < 1 or block % self.group_size):
            raise ValueError(
                f"scale_block is {block!r}; it must be None or a positive multiple of "
                f"group_size={self.group_size}"
            )

    @property
    def block(self) -> int:
        """Elements that share a step."""
        return self.group_size

    @property
    def signed_codes(self) -> bool:
        """Whether codes are two's complement."""
        return self.range == "absmax"

    @property
    def padding_mode(self) -> str:
        """Zeros, as the format has it; they would change the least value of one-sided rows."""
        return "constant" if self.range == "absmax" else "edge"

    def bits(self, k: int) -> float:
        """Four, four for a group's step, and a float32 scale (minmax: and offset) a row."""
        row = 64 if self.range == "minmax" else 32
        return 4 + 4 / self.group_size + row / (self.scale_block or k)

    def outer(self, rows: jax.Array) -> Scales:
        """Return the `codec.RowScale` of the 8-bit stage."""
        return codec.range_scale(rows, range=self.range)

    def inner(self, blocks: jax.Array, outer: Scales) -> Scales:
        """Return what is stored of the step of each group, int32."""
        magnitude = jnp.abs(codec.to_8bit(blocks, outer).astype(jnp.int32))
        return codec.group_step(
            magnitude,
            step=self.step,
            levels=self.levels,
            signed=self.signed_codes,
            search=self.search,
        )

    def encode(self, values: jax.Array, outer: Scales, inner: Scales) -> jax.Array:
        """Return 4-bit codes, int32."""
        kind = {"step": self.step, "levels": self.levels, "rounding": self.rounding}
        wide = codec.to_8bit(values, outer).astype(jnp.int32)
        return codec.code_of(wide, inner, signed=self.signed_codes, **kind)

    def keep(self, outer: Scales, inner: Scales) -> Kept:
        """Return steps, and of rows scale and offset."""
        kept = {"shifts": inner.astype(jnp.uint8), "row_scale": outer.scale}
        return kept if outer.lo is None else kept | {"row_lo": outer.lo}

    def decode(self, codes: jax.Array, kept: Kept) -> jax.Array:
        """Return codes times the group's step and the row's scale, plus the offset."""
        shifts = kept["shifts"].astype(jnp.int32)
        levels = codec.level_of(codes, self.levels)
        wide = levels * (shifts + 1) if self.step == "integer" else levels << shifts
        y = wide.astype(jnp.float32) * kept["row_scale"]
        return y + kept["row_lo"] if "row_lo" in kept else y

    def assemble(self, codes: jax.Array, kept: Kept, k: int) -> PackedRows:
        """Return packed rows; codes int32 [..., groups, group_size]."""
        padding = -k % self.group_size
        groups = (k + padding) // self.group_size
        # Groups that lie past k fill the last scale block only in the making.
        flat = jnp.where(jnp.arange(k + padding) < k, self._row(codes)[..., : k + padding], 0)
        return PackedRows(
            codes=codec.pack(flat.astype(jnp.uint8)),
            shifts=codec.pack(self._row(kept["shifts"])[..., :groups]),
            scale=self._row(kept["row_scale"]),
            lo=self._row(kept["row_lo"]) if "row_lo" in kept else None,
            group_size=self.group_size,
            step=self.step,
            levels=self.levels,
            range=self.range,
            scale_block=self.scale_block,
            padding=padding,
        )

    def _row(self, leaf: jax.Array) -> jax.Array:
        """Join what groups [..., groups, size] hold, of each scale block if there are any."""
        return join(leaf) if self.scale_block is None else join(join(leaf))

    def __str__(self):
        words = ["quartz", f"g{self.group_size}"]
        words += ["truncate"] * (self.rounding == "truncate")
        words += ["integer"] * (self.step == "integer" and self.levels == "uniform")
        words += ["stretched"] * (self.levels == "stretched") + ["search"] * self.search
        words += [f"block{self.scale_block}"] * bool(self.scale_block)
        return " ".join(words + ["minmax"] * (self.range == "minmax"))
