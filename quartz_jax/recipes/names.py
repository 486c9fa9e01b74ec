"""Methods by name, for the linears of a FLUX transformer.

A name is parts joined by "+": any transforms, `gptq` if wanted, and a format last, such as
"nvfp4", "gptq+int4-g64" or "smooth+lowrank+gptq+quartz". Two formats with a slash are weights and
activations: "int4-g64/quartz-g32-block64". "svdquant" stands for "smooth+lowrank".
"""

from quartz_jax.formats import MXFP4, NVFP4, SDR, Int, NumberFormat, Quartz
from quartz_jax.methods.recipe import LayerMethod, Method, MethodRule
from quartz_jax.recipes.recipe import LINEARS
from quartz_jax.rounding.gptq import Gptq, Nearest
from quartz_jax.schema import part
from quartz_jax.transforms.transforms import LowRank, ReverseSmooth, Rotate, Shift, Smooth


@part
class Entry:
    """A format by name: for weights, for activations, and for inputs behind GELU."""

    weight: NumberFormat
    activation: NumberFormat
    one_sided: NumberFormat | None = None  # of the second MLP linear's input; None: as the others
    shift: bool = False  # whether that input is shifted to be non-negative


def _blocks(size: int, width: int = 4) -> Entry:
    options = {"width": width, "block": size, "scale": "float16"}
    plain = Int(**options)
    unsigned = Int(**options, range="unsigned")
    return Entry(weight=plain, activation=plain, one_sided=unsigned, shift=True)


def _same(format_: NumberFormat) -> Entry:
    return Entry(weight=format_, activation=format_)


def _quartz(**fields) -> Entry:
    plain = Quartz(**fields)
    return Entry(weight=plain, activation=plain, one_sided=Quartz(**fields, range="minmax"))


_INT8_ROW = Int(width=8)
FORMATS = {
    "int8": Entry(weight=_INT8_ROW, activation=_INT8_ROW, one_sided=Int(width=8, range="minmax")),
    "int4": _same(Int(width=4)),
    "int4-g64": _blocks(64),
    "int4-g16": _blocks(16),
    "mxfp4": _same(MXFP4()),
    "nvfp4": _same(NVFP4()),
    "sdr": Entry(weight=SDR(base=8), activation=SDR(base=16)),
    "sdr-g32": Entry(weight=SDR(base=8, block=32), activation=SDR(base=16, block=32)),
    "quartz": _quartz(),
    "quartz-truncate": _quartz(rounding="truncate"),
    "quartz-integer": Entry(
        weight=Quartz(step="integer", search=True), activation=Quartz(step="integer")
    ),
    "quartz-g32-block64": _same(Quartz(group_size=32, scale_block=64)),
} | {f"quartz-g{size}": _quartz(group_size=size) for size in (8, 32, 64, 128)}

PARTS = {
    "shift": (Shift(),),
    "smooth": (Smooth(),),
    "smooth.5": (Smooth(alpha=0.5),),
    "reverse": (ReverseSmooth(),),
    "rotate": (Rotate(),),
    "rotate64": (Rotate(block=64),),
    "lowrank": (LowRank(),),
    "svdquant": (Smooth(), LowRank()),
}

# What people would choose between, from the published methods' own settings.
BENCH = (
    "int8,int4,int4-g64,int4-g16,mxfp4,nvfp4,sdr,quartz,quartz-truncate,quartz-integer,"
    "int4-g64/quartz-g32-block64,"
    "gptq+int4-g64,gptq+mxfp4,gptq+nvfp4,gptq+quartz,gptq+quartz-integer,"
    "smooth+int4-g64,smooth+quartz,smooth+quartz-integer,smooth+nvfp4,reverse+quartz,"
    "reverse+gptq+quartz,rotate+int4,rotate+int4-g64,rotate+quartz,rotate+quartz-integer,"
    "rotate+nvfp4,smooth+gptq+quartz-integer,smooth+gptq+nvfp4,svdquant+int4-g64,"
    "svdquant+gptq+int4-g64,svdquant+quartz,svdquant+gptq+quartz,svdquant+gptq+quartz-integer,"
    "svdquant+nvfp4,svdquant+gptq+nvfp4"
)


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list; "bench" stands for the whole comparison."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    bench = BENCH.split(",")
    return list(dict.fromkeys(x for name in names for x in (bench if name == "bench" else [name])))


def get_method(name: str) -> Method:
    """Return a method by its name, see the module's description.

    Adaptive-norm modulation is weight-only and isn't transformed, in every method.

    Raises:
      ValueError: the name has an unknown part; it is named.
    """
    *words, last = name.split("+")
    weights, _, activations = last.partition("/")
    entry = _entry(weights, name)
    if activations:
        other = _entry(activations, name)
        entry = Entry(
            weight=entry.weight,
            activation=other.activation,
            one_sided=other.one_sided,
            shift=other.shift,
        )
    gptq = "gptq" in words
    transforms = ()
    for word in words:
        if word != "gptq":
            transforms += _known(PARTS, word, name)
    rotated = any(isinstance(t, Rotate) for t in transforms)
    rules = {
        "modulation": LayerMethod(weight=entry.weight, rounding=_rounding(gptq)),
        "mlp_down": _layer(entry, transforms, gptq, one_sided=not rotated),
        "others": _layer(entry, transforms, gptq, one_sided=False),
    }
    groups = (("modulation", "modulation"), ("mlp_down", "mlp_down"))
    groups += (("single_out", "others"), ("others", "others"))
    made = (MethodRule(pattern=LINEARS[key], method=rules[rule]) for key, rule in groups)
    return Method(name=name, rules=tuple(made))


def _layer(entry: Entry, transforms: tuple, gptq: bool, *, one_sided: bool) -> LayerMethod:
    one_sided = one_sided and entry.one_sided is not None
    shift = (Shift(),) if one_sided and entry.shift else ()
    return LayerMethod(
        weight=entry.weight,
        activation=entry.one_sided if one_sided else entry.activation,
        transforms=shift + transforms,
        rounding=_rounding(gptq),
    )


def _rounding(gptq: bool) -> Nearest | Gptq:
    return Gptq() if gptq else Nearest()


def _entry(word: str, name: str) -> Entry:
    return _known(FORMATS, word, name)


def _known(table: dict, word: str, name: str):
    if word not in table:
        raise ValueError(f"unknown recipe {name!r}: {word!r} is none of {', '.join(table)}")
    return table[word]
