"""Activation quantization on TPU in one pass over memory: floats to the int8 operand of a matmul.

Four things here are not what one would write first.
- 127 / a is an integer long division: the format wants the correctly rounded quotient, and the
  chip's own division isn't specified to give it. It runs once a row.
- The largest level (step) of a group is found by the matrix unit, since lanes can't be regrouped
  cheaply. Level L becomes 2**(8 L - 127), a float whose bits are L << 26; up to 64 of them add up
  to less than the next level's, so the top bits of the sum are the largest L.
- The matrix unit packs, too: products with 1 and 16 add up to bytes, which bfloat16 operands and
  float32 sums hold exactly.
- A rotation exchanges lanes and adds, though the matrix unit could do all of it: in which order
  that sums isn't specified, and the rotation's float32 sums have one order.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import codec, compat, device
from pallas_kernels.functions import Norm, Part
from pallas_kernels.quantize import channels

_LANES = 128
_BLOCK_ELEMENTS = 3 * 2**18  # of x that one grid step takes
_BLOCK_ROWS = 128
_CHUNK_ELEMENTS = 2**15  # in flight at once: more would spill registers
_CHUNK_COLUMNS = 2048  # the same; each register's width of them is unrolled
_VMEM_BYTES = 48 * 2**20
_INFINITY_BITS = 0x7F800000
_OF_IMAGES = {"norm_scale", "norm_shift"}  # inputs of which each image may have its own row


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """What the kernel needs to know besides its arrays."""

    k: int  # elements of a row
    width: int  # the same, padded
    chunk: int  # columns handled at once, a divisor of width
    bits: int  # 4 or 8
    group_size: int
    asymmetric: bool  # range is "minmax"
    step: str
    levels: str
    rounding: str
    epsilon: float  # of the norm
    centered: bool  # a layer norm, not an RMS norm
    rotation: int | None  # channels of a block
    rotated_from: int  # first channel that is rotated
    packed: bool  # codes and shifts are written, else decoded values

    @property
    def shift_columns(self) -> int:
        """Bytes of packed shifts of a row, padded to whole registers."""
        return -(-self.width // (2 * self.group_size * _LANES)) * _LANES


def quantize(
    x: jax.Array,  # [m, k], floating
    *,
    bits: int,
    group_size: int,
    range: str,
    step: str,
    rounding: str,
    levels: str = "uniform",
    norm: Norm | None = None,  # of [k] or [images, k]
    multiplier: jax.Array | None = None,  # [k]
    rotation: int | None = None,  # channels of a block
    rotated_from: int = 0,  # first channel that is rotated
    wide: jax.Array | None = None,  # bool [groups]
    packed: bool = False,
) -> tuple[jax.Array | None, ...]:
    """Quantize each row; see `reference.quantize`."""
    (m, k), images = x.shape, 1 if norm is None else norm.images
    unit = max(2 * _LANES if packed else _LANES, rotation or 0)
    width = -(-k // unit) * unit
    rows = min(max(_BLOCK_ELEMENTS // width // 32, 1) * 32, _BLOCK_ROWS, m // images)
    columns = min(_CHUNK_ELEMENTS // rows, _CHUNK_COLUMNS)
    plan = _Plan(
        k=k,
        width=width,
        chunk=unit * _largest_divisor(width // unit, columns // unit),
        bits=bits,
        group_size=group_size,
        asymmetric=range == "minmax",
        step=step,
        levels=levels,
        rounding=rounding,
        epsilon=0.0 if norm is None else norm.epsilon,
        centered=norm is None or norm.kind == "layer",
        rotation=rotation,
        rotated_from=rotated_from,
        packed=packed,
    )
    inputs = _inputs(x, norm, multiplier, wide, plan)
    out = _call(inputs | {"x": inputs["x"].reshape(images, -1, width)}, rows, plan)
    out = {key: array.reshape(m, -1) for key, array in out.items()}
    scale, lo = out["scale"], out.get("lo")
    if not packed:
        return out["values"][:, :k], scale, lo
    groups = -(-k // group_size)
    codes, shifts = (lax.bitcast_convert_type(out[key], jnp.uint8) for key in ("codes", "shifts"))
    return codes[:, : groups * group_size // 2], shifts[:, : -(-groups // 2)], scale, lo


def why_not(target: device.Device, x: jax.Array | tuple[Part, ...], **kwargs) -> str | None:
    """Say why the device can't run the kernel, or return None."""
    if target.platform != "tpu":
        return f"needs a TPU, not {target.platform}"
    shapes = [part.array.shape for part in x] if isinstance(x, tuple) else [x.shape]
    return "needs at least one element" if any(0 in shape for shape in shapes) else None


def _inputs(
    x: jax.Array,
    norm: Norm | None,
    multiplier: jax.Array | None,
    wide: jax.Array | None,
    plan: _Plan,
) -> dict[str, jax.Array]:
    """Return the kernel's arrays by name: x, those of its channels, and constant matrices."""
    vectors: dict[str, jax.Array] = {}
    if norm is not None:
        vectors["norm_scale"] = norm.scale
    if norm is not None and norm.shift is not None:
        vectors["norm_shift"] = norm.shift
    if multiplier is not None:
        vectors["multiplier"] = multiplier
    rows = {name: v.astype(jnp.float32).reshape(-1, plan.k) for name, v in vectors.items()}
    inputs = {"x": x} | rows
    if wide is not None:
        inputs["wide"] = -jnp.repeat(jnp.asarray(wide, jnp.int32), plan.group_size)[None]
    inputs = {name: codec.pad(a[:, : plan.k], plan.width) for name, a in inputs.items()}
    if plan.bits == 4:
        inputs["same_group"] = _same_group(plan.group_size)
    if plan.packed:
        inputs["pack_codes"] = _pack_matrix(1, 2 * _LANES)
        # After as many columns as fill a register with bytes of shifts, the matrix repeats.
        columns = min(2 * plan.group_size * _LANES, plan.width)
        inputs["pack_shifts"] = _pack_matrix(plan.group_size, columns)
    return inputs


def _call(inputs: dict[str, jax.Array], rows: int, plan: _Plan) -> dict[str, jax.Array]:
    """Run the kernel over blocks of rows, x [images, m, width]; of an image's norm, one row."""
    rest = dict(inputs)
    x = rest.pop("x")
    images, m, width = x.shape
    outputs = {"scale": (1, jnp.float32)}
    if plan.packed:
        outputs |= {"codes": (width // 2, jnp.int8), "shifts": (plan.shift_columns, jnp.int8)}
    else:
        outputs["values"] = (width, jnp.int8)
    if plan.asymmetric:
        outputs["lo"] = (1, jnp.float32)
    scratch = {}
    if "norm_scale" in inputs:
        scratch["normed"] = pltpu.VMEM((rows, width), x.dtype)
    if "multiplier" in inputs or plan.rotation:
        scratch["rotated"] = pltpu.VMEM((rows, width), jnp.float32)
    if plan.packed:
        scratch["shift_sums"] = pltpu.VMEM((rows, plan.shift_columns), jnp.float32)

    def block(columns):
        return pl.BlockSpec((None, rows, columns), lambda image, i: (image, i, 0))

    specs = {key: pl.BlockSpec(array.shape, lambda image, i: (0, 0)) for key, array in rest.items()}
    for name in _OF_IMAGES & rest.keys():
        apart = rest[name].shape[0] > 1
        rest[name] = rest[name][:, None]
        specs[name] = pl.BlockSpec(
            (None, 1, width),
            lambda image, i, apart=apart: (image if apart else 0, 0, 0),
        )
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid=(images, -(-m // rows)),
        in_specs=[specs | {"x": block(width)}],
        out_specs={key: block(columns) for key, (columns, _) in outputs.items()},
        out_shape={
            key: jax.ShapeDtypeStruct((images, m, columns), dtype)
            for key, (columns, dtype) in outputs.items()
        },
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=device.current().platform != "tpu",
        name="quartz_quantize",
    )(rest | {"x": x})


def _kernel(in_refs, out_refs, scratch_refs, *, plan: _Plan):
    x_ref = in_refs["x"]
    if "normed" in scratch_refs:
        _modulate(in_refs, scratch_refs["normed"], plan)
        x_ref = scratch_refs["normed"]
    if "rotated" in scratch_refs:
        _rotate_channels(x_ref, in_refs, scratch_refs["rotated"], plan)
        x_ref = scratch_refs["rotated"]
    lo, extent, finite = _extremes(x_ref, plan)
    live = finite & (extent >= codec.TINY_RANGE) & (extent < jnp.inf)
    levels = 255 if plan.asymmetric else 127
    tiny = finite & (extent < codec.TINY_RANGE)
    scale = jnp.where(live, extent * jnp.float32(1 / levels), jnp.nan)
    out_refs["scale"][...] = jnp.where(tiny, 0, scale)
    multiplier = _divide(levels, jnp.where(live, extent, 1.0))
    if plan.asymmetric:
        out_refs["lo"][...] = jnp.where(live | tiny, lo, jnp.nan)
    kept = jnp.where(live, -1, 0)  # a mask of bits
    if plan.packed:
        sums_ref = scratch_refs["shift_sums"]
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def body(i, _):
        x = _load(x_ref, i, plan)
        scaled = (x - lo if plan.asymmetric else jnp.abs(x)) * multiplier
        magnitude = jnp.round(scaled).astype(jnp.int32) & kept
        if plan.k != plan.width:
            magnitude = jnp.where(_column(i, plan, x.shape[0]) < plan.k, magnitude, 0)
        negative = None if plan.asymmetric else x < 0
        _store(i, magnitude, negative, in_refs, out_refs, scratch_refs, plan)
        return _

    lax.fori_loop(0, plan.width // plan.chunk, body, 0)
    if plan.packed:
        out_refs["shifts"][...] = _to_bytes(sums_ref[...])


def _modulate(in_refs, normed_ref, plan: _Plan) -> None:
    """Write `reference.modulate` of a block of rows, zeros in the padding."""
    x_ref = in_refs["x"]
    start = jnp.zeros((x_ref.shape[0], plan.chunk), jnp.float32)
    chunks = plan.width // plan.chunk

    def mean(values_of):
        total = lax.fori_loop(0, chunks, lambda i, total: total + values_of(i), start)
        return jnp.sum(total, axis=1, keepdims=True) / plan.k

    def masked(i, values):
        inside = plan.k == plan.width or _column(i, plan, values.shape[0]) < plan.k
        return jnp.where(inside, values, 0)

    def load(i):
        return x_ref[:, _chunk(i, plan)].astype(jnp.float32)

    average = mean(load) if plan.centered else 0.0
    variance = mean(lambda i: jnp.square(masked(i, load(i) - average))) + plan.epsilon
    multiplier = lax.rsqrt(variance)
    # The chip's own root isn't specified to float32's precision: one step of Newton's method.
    refined = multiplier * (1.5 - 0.5 * variance * multiplier * multiplier)
    multiplier = jnp.where(variance < jnp.inf, refined, multiplier)

    def write(i, _):
        at = _chunk(i, plan)
        normed = (load(i) - average) * multiplier
        y = normed * in_refs["norm_scale"][:, at]
        y = y + in_refs["norm_shift"][:, at] if "norm_shift" in in_refs else y
        normed_ref[:, at] = masked(i, y).astype(normed_ref.dtype)
        return _

    lax.fori_loop(0, chunks, write, 0)


def _rotate_channels(x_ref, in_refs, rotated_ref, plan: _Plan) -> None:
    """Write what `channels` makes of a block of rows: a factor a channel, and the rotation."""
    rows = x_ref.shape[0]

    def write(i, _, turned):
        at = _chunk(i, plan)
        x = x_ref[:, at].astype(jnp.float32)
        if "multiplier" in in_refs:
            x = channels.scale_channels(x, in_refs["multiplier"][:, at])
        rotated_ref[:, at] = rotated(i, x) if turned else x
        return _

    def rotated(i, given):
        size = max(plan.rotation, _LANES)
        # Lanes of a single row aren't gathered: it is taken twice.
        x = jnp.broadcast_to(given, (max(rows, 2), plan.chunk))
        parts = [x[:, start : start + size] for start in range(0, plan.chunk, size)]
        x = jnp.concatenate([_rotate(part, plan.rotation) for part in parts], axis=1)[:rows]
        if plan.rotated_from % plan.chunk:
            x = jnp.where(_column(i, plan, rows) < plan.rotated_from, given, x)
        return x

    chunks = plan.width // plan.chunk
    first = plan.rotated_from // plan.chunk if plan.rotation else chunks
    if first:
        lax.fori_loop(0, first, functools.partial(write, turned=False), 0)
    if first < chunks:
        lax.fori_loop(first, chunks, functools.partial(write, turned=True), 0)


def _rotate(x: jax.Array, size: int) -> jax.Array:
    """Return `channels.rotate` of [rows, 128 or 256]."""
    distance = 1
    while distance < size:
        # The second of a pair has the difference negated.
        other = _swap(x, distance)
        x = (x + other) + _swap(x - other, 2 * distance)
        distance *= 4
    return x * jnp.float32(channels.root(size))


def _swap(x: jax.Array, distance: int) -> jax.Array:
    """Return each lane's partner, whose number differs in the bit of the distance."""
    parts = [x[:, start : start + _LANES] for start in range(0, x.shape[1], _LANES)]
    if distance == _LANES:
        return jnp.concatenate(parts[::-1], axis=1)
    # One gather of the lanes takes half as long as two rolls and a choice.
    partner = lax.broadcasted_iota(jnp.int32, parts[0].shape, 1) ^ distance
    take = functools.partial(jnp.take_along_axis, axis=1, mode="promise_in_bounds")
    return jnp.concatenate([take(part, partner) for part in parts], axis=1)


def _chunk(i: jax.Array, plan: _Plan):
    return pl.ds(pl.multiple_of(i * plan.chunk, _LANES), plan.chunk)


def _load(x_ref, i: jax.Array, plan: _Plan) -> jax.Array:
    x = x_ref[:, _chunk(i, plan)].astype(jnp.float32)
    return jnp.where(jnp.abs(x) < 2.0**-126, 0, x) if plan.asymmetric else x


def _column(i: jax.Array, plan: _Plan, rows: int) -> jax.Array:
    """Return the column of x that each element of chunk i is."""
    return i * plan.chunk + lax.broadcasted_iota(jnp.int32, (rows, plan.chunk), 1)


def _extremes(x_ref, plan: _Plan):
    """Return lo, max - lo (or max|x|) and whether all of the row is finite, each [rows, 1]."""
    rows = x_ref.shape[0]

    def body(i, carry):
        low, high, peak = carry
        x = _load(x_ref, i, plan)
        bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
        if plan.asymmetric:
            inside = plan.k == plan.width or _column(i, plan, rows) < plan.k
            low = jnp.minimum(low, jnp.where(inside, x, jnp.inf))
            high = jnp.maximum(high, jnp.where(inside, x, -jnp.inf))
        return low, high, jnp.maximum(peak, bits)

    full = functools.partial(jnp.full, (rows, plan.chunk))
    start = (full(jnp.inf), full(-jnp.inf), full(0)) if plan.asymmetric else (0.0, 0.0, full(0))
    low, high, peak = lax.fori_loop(0, plan.width // plan.chunk, body, start)
    # As integers a NaN is the largest; none is left when the lanes are compared as floats.
    peak = lax.bitcast_convert_type(jnp.minimum(peak, _INFINITY_BITS), jnp.float32)
    peak = jnp.max(peak, axis=1, keepdims=True)
    if not plan.asymmetric:
        return None, peak, peak < jnp.inf
    low = jnp.min(low, axis=1, keepdims=True)
    return low, jnp.max(high, axis=1, keepdims=True) - low, peak < jnp.inf


def _divide(levels: int, extent: jax.Array) -> jax.Array:
    """Return levels / extent, correctly rounded, for extents from 2**-100 to the largest float."""
    bits = lax.bitcast_convert_type(extent, jnp.int32)
    divisor = (bits & 0x7FFFFF) | 0x800000
    align = 24 - levels.bit_length()
    rest, quotient = jnp.full_like(bits, levels << align), jnp.zeros_like(bits)
    for _ in range(26):
        fits = rest >= divisor
        quotient = (quotient << 1) + jnp.where(fits, 1, 0)
        rest = (rest - jnp.where(fits, divisor, 0)) << 1
    # 25 or 26 bits, of which float32 keeps 24. What the division left counts as more than half.
    drop = jnp.where(quotient >= 1 << 25, 2, 1)
    kept = lax.shift_right_logical(quotient, drop)
    tail = 2 * (quotient - (kept << drop)) + jnp.where(rest > 0, 1, 0)
    half = 1 << drop
    up = (tail > half) | ((tail == half) & ((kept & 1) == 1))
    kept = kept + jnp.where(up, 1, 0)
    exponent = drop + (275 - align) - lax.shift_right_logical(bits, 23)
    return lax.bitcast_convert_type((exponent << 23) + kept - 0x800000, jnp.float32)


def _store(i, magnitude, negative, in_refs, out_refs, scratch_refs, plan: _Plan) -> None:
    """Take magnitudes (values, if asymmetric) of chunk i through stage 2 and write them."""

    def signed(values):
        return values if negative is None else jnp.where(negative, -values, values)

    if plan.bits == 4:
        codes, level = _encode(magnitude, in_refs["same_group"][...], plan)
    if plan.packed:
        matrices, sums_ref = (
            (in_refs["pack_codes"], in_refs["pack_shifts"]),
            scratch_refs["shift_sums"],
        )
        _store_packed(i, signed(codes), level, matrices, out_refs["codes"], sums_ref, plan)
        return
    values = magnitude if plan.bits == 8 else _decode(codes, level, plan)
    if "wide" in in_refs:
        values = values ^ ((values ^ magnitude) & in_refs["wide"][:, _chunk(i, plan)])
    values = values - 128 if plan.asymmetric else signed(values)
    out_refs["values"][:, _chunk(i, plan)] = values.astype(jnp.int8)


def _store_packed(i, codes, level, matrices, codes_ref, sums_ref, plan: _Plan) -> None:
    """Write the bytes of a chunk's codes, and add those of its shifts, which are level - 1."""
    pack_codes, pack_shifts = matrices
    nibbles = (codes & 15).astype(jnp.float32).astype(jnp.bfloat16)
    shifts = (level - 1).astype(jnp.float32).astype(jnp.bfloat16)
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    parts = [
        _to_bytes(dot(nibbles[:, start : start + 2 * _LANES], pack_codes[...]))
        for start in range(0, plan.chunk, 2 * _LANES)
    ]
    half = plan.chunk // 2
    at = pl.ds(pl.multiple_of(i * half, _LANES), half)
    codes_ref[:, at] = jnp.concatenate(parts, axis=1)
    for start in range(0, plan.chunk, _LANES):
        column = i * plan.chunk + start
        period, rest = column // pack_shifts.shape[0], column % pack_shifts.shape[0]
        matrix = pack_shifts[pl.ds(pl.multiple_of(rest, _LANES), _LANES), :]
        at = pl.ds(pl.multiple_of(period * _LANES, _LANES), _LANES)
        sums_ref[:, at] += dot(shifts[:, start : start + _LANES], matrix)


def _to_bytes(sums: jax.Array) -> jax.Array:
    """Return the int8 with the bits of float32 integers 0..255."""
    return ((sums.astype(jnp.int32) ^ 128) - 128).astype(jnp.int8)


def _encode(
    magnitude: jax.Array,  # [rows, chunk], int32: magnitudes, or the values if asymmetric
    same_group: jax.Array,  # [128, 128], bfloat16
    plan: _Plan,
) -> tuple[jax.Array, jax.Array]:
    """Return magnitudes of codes, and each element's step or (for powers) shift + 1, int32."""
    code_bits = 4 if plan.asymmetric else 3
    top = (1 << code_bits) - 1
    # Divisions by multiplication, exact in this range.
    if plan.levels == "stretched":
        level = lax.shift_right_logical((4 * magnitude + 18) * 1772, 16)  # by 37
        level = jnp.clip(level, 1, codec.MAX_STRETCHED_STEP)
    elif plan.step == "integer":
        level = lax.shift_right_logical((2 * magnitude + 7) * 4370, 16)  # by 15
        level = jnp.clip(level, 1, codec.MAX_STEP)
    else:
        level = 33 - code_bits - lax.clz(magnitude | top)
    level = _largest_of_group(level, same_group)
    if plan.step == "integer":
        # Multiples of 1/64 away from an integer, so that an approximate reciprocal will do.
        ratio = (2 * magnitude + level).astype(jnp.float32) + 0.5
        ratio = ratio * compat.tpu_reciprocal((2 * level).astype(jnp.float32))
        codes = ratio.astype(jnp.int32)
        if plan.levels == "uniform":
            return jnp.minimum(codes, top), level
        upper = jnp.where(magnitude < 8 * level, top - 1, top)
        codes = jnp.minimum(codes, codec.STRETCH_FROM)
        return jnp.where(magnitude < 6 * level, codes, upper), level
    shift = level - 1
    half = 0 if plan.rounding == "truncate" else (1 << shift) >> 1
    return jnp.minimum(lax.shift_right_logical(magnitude + half, shift), top), level


def _decode(codes: jax.Array, level: jax.Array, plan: _Plan) -> jax.Array:
    """Return the 8-bit magnitudes of `_encode`'s codes and levels."""
    if plan.step == "power":
        return codes << (level - 1)
    if plan.levels == "stretched":
        codes = codes + jnp.maximum(codes - codec.STRETCH_FROM, 0)
    return codes * level


def _largest_of_group(level: jax.Array, same_group: jax.Array) -> jax.Array:
    """Return the largest level, 1..16, of each element's group."""
    powers = lax.bitcast_convert_type(level << 26, jnp.float32).astype(jnp.bfloat16)
    parts = [powers[:, i : i + _LANES] for i in range(0, level.shape[1], _LANES)]
    sums = [jnp.dot(part, same_group, preferred_element_type=jnp.float32) for part in parts]
    return lax.shift_right_logical(
        lax.bitcast_convert_type(jnp.concatenate(sums, axis=1), jnp.int32), 26
    )


def _same_group(group_size: int) -> jax.Array:
    """Return a [128, 128] matrix with 1 where row and column belong to one group."""
    group = jnp.arange(_LANES) // group_size
    return (group[:, None] == group).astype(jnp.bfloat16)


def _pack_matrix(size: int, columns: int) -> jax.Array:
    """Return the [columns, 128] matrix that packs the first of each `size` columns, two a byte."""
    column = np.arange(columns)[:, None]
    weight = np.where(column % (2 * size) == 0, 1, 0) + np.where(column % (2 * size) == size, 16, 0)
    return jnp.asarray(weight * (column // (2 * size) == np.arange(_LANES)), jnp.bfloat16)


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(max(min(number, limit), 1), 0, -1) if number % d == 0)
