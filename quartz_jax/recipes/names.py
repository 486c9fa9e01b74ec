"""Recipes by name, one grammar for all of them.

A name is parts joined by "+": any transforms, `gptq` if wanted, and a format last, such as
"nvfp4", "gptq+int4-g64" or "smooth+lowrank+gptq+quartz". Two formats with a slash are weights and
activations: "int4-g64/quartz-g32-block64"; "bf16" after the slash leaves inputs 16-bit. "svdquant"
stands for "smooth+lowrank".
"""

import dataclasses

from quartz_jax import schema
from quartz_jax.formats import (
    IF4,
    MXFP4,
    NVFP4,
    SDR,
    FittedTable,
    Format,
    HiF4,
    Int,
    Quartz,
    RaZeR,
    Table,
)
from quartz_jax.recipes.recipe import LayerRecipe, Match, Recipe, Rule
from quartz_jax.rounding import Nearest, Rounding
from quartz_jax.transforms import LowRank, Rotate, Shift, Smooth, Transform

# Roles whose inputs are quantized like any other; the rest have rules of their own.
PLAIN_ROLES = (
    *("attention_in", "attention_out", "mlp_in", "mixed_in", "mixed_out", "linear"),
    *("projection", "conv", "shortcut", "resample"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A format by name: for weights, for activations, and for inputs behind GELU."""

    weight: Format
    activation: Format | None
    one_sided: Format | None = None  # of the input of an MLP's last linear; None: as the others
    shift: bool = False  # whether that input is shifted to be non-negative


def _blocks(size: int, width: int = 4) -> Entry:
    plain = Int(width=width, block=size, scale="float16")
    unsigned = Int(width=width, block=size, scale="float16", range="unsigned")
    return Entry(weight=plain, activation=plain, one_sided=unsigned, shift=True)


def _same(format_: Format) -> Entry:
    return Entry(weight=format_, activation=format_)


def _quartz(plain: Quartz) -> Entry:
    one_sided = dataclasses.replace(plain, range="minmax")
    return Entry(weight=plain, activation=plain, one_sided=one_sided)


def _integer(**fields) -> Entry:
    online = Quartz(step="integer", **fields)
    return Entry(weight=dataclasses.replace(online, search=True), activation=online)


INT8 = Int(width=8)
FORMATS = {
    "bf16": Entry(weight=INT8, activation=None),  # of activations only, see `_entry`
    "int8": Entry(weight=INT8, activation=INT8, one_sided=Int(width=8, range="minmax")),
    "int4": _same(Int(width=4)),
    "int4-g64": _blocks(64),
    "int4-g16": _blocks(16),
    "mxfp4": _same(MXFP4()),
    "nvfp4": _same(NVFP4()),
    "nvfp4-4or6": _same(NVFP4(block_max="4or6")),
    "if4": _same(IF4()),
    "razer": _same(RaZeR()),
    "hif4": _same(HiF4()),
    "asym-w4a8": Entry(weight=FittedTable(), activation=INT8),
    "table": Entry(weight=Table(), activation=INT8),
    "sdr": Entry(weight=SDR(base=8), activation=SDR(base=16)),
    "sdr-g32": Entry(weight=SDR(base=8, block=32), activation=SDR(base=16, block=32)),
    "quartz": _quartz(Quartz()),
    "quartz-truncate": _quartz(Quartz(rounding="truncate")),
    "quartz-integer": _integer(),
    "quartz-stretched": _integer(levels="stretched"),
    "quartz-stretched-g8": _integer(levels="stretched", group_size=8),
    "quartz-g32-block64": _same(Quartz(group_size=32, scale_block=64)),
} | {f"quartz-g{size}": _quartz(Quartz(group_size=size)) for size in (8, 32, 64, 128)}

# Words that stand for several parts, or for a part with other settings than its own word's.
_PHRASES: dict[str, tuple[Transform, ...]] = {
    "smooth.5": (Smooth(alpha=0.5),),
    "rotate16": (Rotate(block=16),),
    "rotate64": (Rotate(block=64),),
    # in heads of attention for nothing, the rest in the pass that quantizes
    "fold16": (Rotate(block=16, fold=16),),
    "fold64": (Rotate(block=16, fold=64),),
    "svdquant": (Smooth(), LowRank()),
}

# What people would choose between, from the published methods' own settings.
BENCH = (
    "int8,int4,int4-g64,int4-g16,mxfp4,nvfp4,nvfp4-4or6,if4,razer,hif4,asym-w4a8,table,sdr,quartz,"
    "quartz-truncate,quartz-integer,quartz-stretched,int4-g64/quartz-g32-block64,"
    "gptq+int4-g64,gptq+mxfp4,gptq+nvfp4,gptq+quartz,gptq+quartz-integer,"
    "smooth+int4-g64,smooth+quartz,smooth+quartz-integer,smooth+nvfp4,reverse+quartz,"
    "reverse+gptq+quartz,rotate+int4,rotate+int4-g64,rotate+quartz,rotate+quartz-integer,"
    "rotate+nvfp4,rotate+gptq+quartz-stretched-g8/int8,smooth+gptq+quartz-integer,"
    "smooth+gptq+nvfp4,svdquant+int4-g64,"
    "svdquant+gptq+int4-g64,svdquant+quartz,svdquant+gptq+quartz,svdquant+gptq+quartz-integer,"
    "svdquant+nvfp4,svdquant+gptq+nvfp4"
)


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list; "bench" stands for the whole comparison."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    bench = BENCH.split(",")
    return list(dict.fromkeys(x for name in names for x in (bench if name == "bench" else [name])))


def named_recipe(name: str) -> Recipe:
    """Return a recipe by its parts, see the module's description.

    Modulation is weight-only and isn't transformed, in every recipe.

    Raises:
      ValueError: the name has an unknown part; it is named.
    """
    *words, last = name.split("+")
    weights, _, activations = last.partition("/")
    entry = _entry(weights, name)
    if activations:
        other = _known(FORMATS, activations, name)
        entry = dataclasses.replace(other, weight=entry.weight)
    transforms, rounding = _steps(words, name)
    rotated = any(isinstance(t, Rotate) for t in transforms)
    behind_gelu = entry.one_sided is not None and not rotated
    shift = (Shift(),) if behind_gelu and entry.shift else ()
    plain = LayerRecipe(
        weight=entry.weight,
        activation=entry.activation,
        transforms=transforms,
        rounding=rounding,
    )
    one_sided = plain
    if behind_gelu:
        one_sided = dataclasses.replace(
            plain, activation=entry.one_sided, transforms=shift + transforms
        )
    return role_recipe(name, plain, mlp_out=one_sided)


def role_recipe(
    name: str,
    plain: LayerRecipe,
    *,
    mlp_out: LayerRecipe | None = None,
    mixed_out: LayerRecipe | None = None,
    modulation: Format | None = None,
) -> Recipe:
    """Return a recipe for any family, from what is done to its layers by their roles.

    Args:
      name: of the recipe.
      plain: for every layer of the blocks but those below; embedders and heads stay 16-bit.
      mlp_out: for the last linears of MLPs; None: as the others.
      mixed_out: for those that share their input with attention's output; None: as the others.
      modulation: of the weights of modulations, whose inputs stay 16-bit; None: as the others.
    """
    weight_only = dataclasses.replace(plain, activation=None, transforms=())
    finer = dataclasses.replace(weight_only, weight=modulation or plain.weight)
    others = {"mlp_out": mlp_out, "mixed_out": mixed_out}
    given = {role: layer for role, layer in others.items() if layer not in (None, plain)}
    roles = tuple(r for r in (*PLAIN_ROLES, "mlp_out") if r not in given)
    if finer == weight_only:
        rules = [Rule(match=Match(role=("modulation", "outlier_out")), layer=weight_only)]
    else:
        rules = [Rule(match=Match(role="modulation"), layer=finer)]
        rules += [Rule(match=Match(role="outlier_out"), layer=weight_only)]
    rules += [Rule(match=Match(role=role), layer=layer) for role, layer in given.items() if layer]
    return Recipe(name=name, rules=(*rules, Rule(match=Match(role=roles), layer=plain)))


def _steps(words: list[str], name: str) -> tuple[tuple[Transform, ...], Rounding]:
    """Return the transforms that words stand for, and the rounding."""
    transforms: tuple[Transform, ...] = ()
    rounding: Rounding = Nearest()
    made = {word: (cls(),) for word, cls in schema.words(Transform).items()} | _PHRASES
    roundings = schema.words(Rounding)
    for word in words:
        if word in roundings:
            rounding = roundings[word]()
        else:
            transforms += _known(made | dict.fromkeys(roundings, ()), word, name)
    return transforms, rounding


def _entry(word: str, name: str) -> Entry:
    """Return the entry of a format for weights."""
    return _known({key: entry for key, entry in FORMATS.items() if key != "bf16"}, word, name)


def _known(table: dict, word: str, name: str):
    if word not in table:
        raise ValueError(f"unknown recipe {name!r}: {word!r} is none of {', '.join(table)}")
    return table[word]
