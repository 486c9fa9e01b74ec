"""The report of a comparison: six columns and their images first, then plots, then the rest."""

import colorsys
import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from quartz_jax.evaluation.metrics import bootstrap_interval
from quartz_jax.evaluation.pages import html as pages
from quartz_jax.evaluation.results import COLUMNS, ImageStore, cell, folder_name

# What a person can compare at one glance; everything else is folded.
LEAD = ("bf16", "w4a8x", "w4a8x-gptq", "w4a4", "nvfp4", "svdquant+nvfp4")
_ERROR_GAIN = 4  # of error maps, so that small errors show
# From most to least telling; the first that the results hold sorts the images.
_ORDER = ("lpips", "stlpips", "ssim", "psnr")
# What the plots by layer and timestep show, if the results hold any of them, each in its colour.
_COLOURS = {
    "w4a8x": "C0",
    "w4a8x-gptq": "C9",
    "w4a4": "C3",
    "w4a4x-gptq": "C6",
    "w4a8x-branch": "#0b3d66",
    "nvfp4": "C2",
    "svdquant+nvfp4": "#0b5d1e",
    "mxfp4": "C4",
    "int4": "C1",
    "int4-g64": "C8",
    "svdquant+int4-g64": "C5",
}
_GOLDEN = (5**0.5 - 1) / 2  # of the circle of hues: steps of it never come back to the same one
_RISING = {"lpips": True, "stlpips": True, "ssim": False, "psnr": False}  # whether more is worse
_TITLES = {"lpips": "LPIPS to bf16", "stlpips": "ST-LPIPS to bf16"}
_TITLES |= {"ssim": "SSIM to bf16", "psnr": "PSNR to bf16, dB"}

Load = Callable[[str], np.ndarray]  # name of a row to its images, uint8 [n, h, w, 3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the parts of the page are made from."""

    done: dict[str, Any]  # finished entries of the results by row, bf16 among them
    ranked: list[str]  # all rows that aren't 16-bit, best first
    metric: str  # that ranks them
    prompts: list[str]
    load: Load

    @property
    def lead(self) -> list[str]:
        """The rows to show first, bf16 too; the best ones where none of those is there."""
        found = [name for name in LEAD if name in self.done]
        return found if len(found) > 1 else ["bf16", *self.ranked[: len(LEAD) - 1]]

    @property
    def rest(self) -> list[str]:
        """The other rows, best first."""
        lead = self.lead
        return [name for name in self.ranked if name not in lead]

    @functools.cached_property
    def colours(self) -> dict[str, str]:
        """The colour of each row, the same in every figure."""
        return colours(self.done)

    def badness(self, name: str) -> np.ndarray:
        """The figures of a row's images, less is better, [n]."""
        return _badness(self.done[name], self.metric)

    def figure(self, name: str, i: int) -> float:
        """The figure of an image of a row."""
        return self.done[name]["scores"][self.metric][i]


def comparison_page(results: dict[str, Any], images: Path, note: str = "", links: str = "") -> str:
    """Return the page of a results file.

    Args:
      results: what evaluate wrote, with at least one finished row besides bf16.
      images: the folder of images beside it, one folder a row.
      note: a paragraph to put first, in plain text.
      links: HTML with links to pages that belong to it.

    Raises:
      ValueError: no recipe is finished, or bf16's images are missing.
    """
    made = compare(results, images)
    pages.check_plots()
    compared = {name: made.done[name] for name in made.ranked}
    return pages.page(
        f"{results['settings']['model']}: {len(compared)} ways to quantize it",
        pages.paragraph(note, "lead") if note else "",
        pages.paragraph(standing(compared, made.metric), "lead"),
        links,
        _side_by_side(made),
        _same_prompts(made),
        _scatter(made),
        _by_layer_and_step(made),
        _cases(made),
        _table(made),
        _colophon(results),
    )


def compare(results: dict[str, Any], images: Path) -> Comparison:
    """Return what the page shows of a results file; see `comparison_page`."""
    prompts = results["settings"]["prompts"]
    whole = {n: e for n, e in results["recipes"].items() if e.get("summary")}
    done = {n: e for n, e in whole.items() if len(e["scores"]["psnr"]) == len(prompts)}
    compared = {n: e for n, e in done.items() if e["summary"]["weight_bits"] < 16}
    if not compared or "bf16" not in done:
        raise ValueError("the report needs bf16 and at least one finished recipe; evaluate them")
    metric = next(m for m in _ORDER if all(m in e["scores"] for e in compared.values()))
    return Comparison(
        done=done,
        ranked=sorted(compared, key=lambda n: _badness(compared[n], metric).mean()),
        metric=metric,
        prompts=prompts,
        load=functools.cache(lambda n: ImageStore(images / folder_name(n)).load(len(prompts))),
    )


def colours(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for each row, no two alike; those without one of their own get it in order.

    Rows are only ever added to results, so that a row's colour stays what it was.
    """
    others = (name for name in names if name not in _COLOURS)
    return _COLOURS | {name: _colour(number) for number, name in enumerate(others)}


def _colour(number: int) -> str:
    """Return a colour that is darker, by number in turn, than those that are given by name."""
    lightness = (0.3, 0.4, 0.22)[number % 3]
    parts = colorsys.hls_to_rgb(number * _GOLDEN % 1, lightness, 0.6)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def standing(compared: dict[str, Any], metric: str) -> str:
    """Return where QuaRTZ stands against the rivals, from paired differences of the figures."""
    own = [n for n in ("w4a8x", "w4a8x-gptq", "w4a4", "w4a4x") if n in compared]
    rivals = ("nvfp4", "mxfp4", "int4-g64", "svdquant+int4-g64", "svdquant+gptq+int4-g64")
    sentences = []
    for name in own[:2]:
        for rival in (r for r in rivals if r in compared):
            pair = (_badness(compared[name], metric), _badness(compared[rival], metric))
            difference = bootstrap_interval(pair[0] - pair[1])
            word = "better than" if difference.high < 0 else "not told apart from"
            word = "worse than" if difference.low > 0 else word
            bits = [_bits(compared[n]) for n in (name, rival)]
            sentences.append(
                f"{name} ({bits[0]:.2f} bits) is {word} {rival} ({bits[1]:.2f}): "
                f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
            )
    if not sentences:
        return f"Figures are {_TITLES[metric]}; QuaRTZ and a rival to set it against are missing."
    sign = "" if _RISING[metric] else " (sign turned, so that less is better)"
    return f"{_TITLES[metric]}{sign}, paired differences with 95 % intervals: " + "; ".join(
        sentences
    )


def _badness(entry: dict[str, Any], metric: str) -> np.ndarray:
    values = np.array(entry["scores"][metric])
    return values if _RISING[metric] else -values


def _bits(entry: dict[str, Any]) -> float:
    return (entry["summary"]["weight_bits"] + entry["summary"]["activation_bits"]) / 2


def _side_by_side(made: Comparison) -> str:
    """Return the figures of the leading rows, a column each."""
    rows = [made.done[name]["summary"] for name in made.lead]
    keys = [key for key in COLUMNS if key != "recipe" and any(key in row for row in rows)]
    body = [[COLUMNS[key], *(cell(key, row.get(key)) for row in rows)] for key in keys]
    words = (
        "Executed rows are what this library runs on this device, placed for its kernels; a "
        "simulated one has no kernel, and only its arithmetic is compared."
    )
    return pages.section(
        "Side by side", pages.paragraph(words), pages.table(["", *made.lead], body)
    )


def _same_prompts(made: Comparison) -> str:
    """The prompts that are easiest, typical and hardest over all methods, for every method."""
    order = np.argsort(np.mean([made.badness(name) for name in made.ranked], axis=0))
    picks = {"easiest": order[0], "typical": order[len(order) // 2], "hardest": order[-1]}
    words = f"From the same noise. Under each picture its {_TITLES[made.metric]}."
    parts = [pages.paragraph(words), _walls(made, picks, made.lead)]
    if made.rest:
        parts.append(pages.folded("Every other method", _walls(made, picks, made.rest)))
    return pages.section("The same three prompts", *parts)


def _walls(made: Comparison, picks: dict[str, int], names: list[str]) -> str:
    parts = []
    for word, i in picks.items():
        cards = [
            pages.image(
                made.load(name)[i],
                name if name == "bf16" else f"{name} · {made.figure(name, i):.3f}",
            )
            for name in names
        ]
        parts.append(f"<p><b>{word}</b>: “{pages.text(made.prompts[i])}”</p>")
        parts.append(f"<div class=wall>{''.join(cards)}</div>")
    return "".join(parts)


def _scatter(made: Comparison) -> str:
    compared, metric = {name: made.done[name] for name in made.ranked}, made.metric
    figure, axes = pages.new_figure(11, max(5, 0.19 * len(compared)))
    axis = axes[0, 0]
    order = sorted(compared, key=lambda name: compared[name]["summary"][metric]["mean"])
    for place, name in enumerate(order):
        value, x = compared[name]["summary"][metric], _bits(compared[name])
        y, drawn = value["mean"], made.colours[name]
        spread = [[y - value["low"]], [value["high"] - y]]
        axis.errorbar(x, y, yerr=spread, fmt="o", color=drawn, markersize=5, linewidth=1)
        # Names stand in a column at the right, in the points' order, so that none lies on another.
        height = (place + 0.5) / len(order)
        axis.annotate(
            name,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=drawn,
            arrowprops={"arrowstyle": "-", "color": drawn, "alpha": 0.35, "linewidth": 0.6},
        )
    axis.set_xscale("log", base=2)
    ticks = [4, 4.5, 5, 6, 8, 12, 16]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set(xlabel="stored bits an element, mean of weights and inputs", ylabel=_TITLES[metric])
    if _RISING[metric]:
        axis.set_yscale("log")
    bits = [_bits(entry) for entry in compared.values()]
    axis.set_xlim(min(bits) * 0.97, max(bits) * 1.04)
    axis.grid(alpha=0.25)
    caption = (
        "Every method: error against bits, scales, shifts and 16-bit branches counted. Bars are "
        "bootstrap 95 % intervals over prompts."
    )
    return pages.section("Error against bits", pages.plot(figure, caption))


def _by_layer_and_step(made: Comparison, most: int = 10) -> str:
    shown = [n for n in made.ranked if made.done[n].get("sqnr")]
    core = [n for n in shown if n in _COLOURS] or shown[:most]
    if not core:
        return ""
    layers = list(made.done[core[0]]["sqnr"])
    figure, axes = pages.new_figure(11, 7)
    for name in core:
        values = [made.done[name]["sqnr"].get(layer, np.nan) for layer in layers]
        axes[0, 0].plot(values, ".-", label=name, linewidth=1, color=made.colours[name])
    axes[0, 0].set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axes[0, 0].set(ylabel="SQNR of the layer's output, dB")
    axes[0, 0].legend(fontsize=7, ncols=3)
    axes[0, 0].grid(alpha=0.25)
    layer_words = "Each layer on the 16-bit model's own inputs: no error from layers before it."
    first = pages.plot(figure, layer_words)
    figure, axes = pages.new_figure(9, 4.5)
    for name in core:
        entry = made.done[name]
        values = np.mean(entry["velocity"], axis=1)
        axes[0, 0].plot(
            entry["sigmas"], values, ".-", label=name, linewidth=1, color=made.colours[name]
        )
    axes[0, 0].set(xlabel="noise level, 1 (noise) to 0", ylabel="|v - v16| / |v16|", yscale="log")
    axes[0, 0].invert_xaxis()
    axes[0, 0].legend(fontsize=7, ncols=3)
    step_words = "One step from the 16-bit model's latents: error of the predicted velocity."
    return pages.section("By layer and by timestep", first, pages.plot(figure, step_words))


def _cases(made: Comparison) -> str:
    names = [name for name in made.lead if name != "bf16"]
    words = (
        f"Each method's own best, median and worst case by {_TITLES[made.metric]}: bf16, the "
        f"method, the absolute error times {_ERROR_GAIN}, and a crop of both where the error is "
        "largest."
    )
    parts = [pages.folded(name, _cases_of(made, name)) for name in names]
    if made.rest:
        others = (pages.folded(name, _cases_of(made, name)) for name in made.rest)
        parts.append(pages.folded("Every other method", *others))
    return pages.section("Best, median, worst", pages.paragraph(words), *parts)


def _cases_of(made: Comparison, name: str) -> str:
    order = np.argsort(made.badness(name))
    picks = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
    rows = []
    for word, i in picks.items():
        label = f"{word}, {made.figure(name, i):.3f}: {made.prompts[i]}"
        pair = (made.load("bf16")[i], made.load(name)[i])
        rows.append(_case(pair, textwrap.shorten(label, 90)))
    return "".join(rows)


def _case(pair: tuple[np.ndarray, np.ndarray], label: str) -> str:
    exact, got = pair
    error = np.abs(exact.astype(int) - got.astype(int))
    shown = np.clip(_ERROR_GAIN * error, 0, 255).astype(np.uint8)
    crops = [pages.image(part, zoom=4) for part in _crops(exact, got, error.sum(axis=-1))]
    whole = [pages.image(exact, label), pages.image(got), pages.image(shown)]
    return f"<div class=case>{''.join(whole + crops)}</div>"


def _crops(exact, got, error) -> list[np.ndarray]:
    """The quarter of the side with the most error, from both images."""
    side = max(8, error.shape[0] // 4)
    sums = np.pad(error.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    y, x = np.unravel_index(np.argmax(boxes), boxes.shape)
    return [np.ascontiguousarray(part[y : y + side, x : x + side]) for part in (exact, got)]


def _table(made: Comparison) -> str:
    rows = [made.done[name]["summary"] for name in ("bf16", *made.ranked)]
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    body = [[cell(key, row.get(key)) for key in columns] for row in rows]
    table = pages.table(list(columns.values()), body)
    return pages.section("The table", pages.folded(f"All {len(rows)} rows", table))


def _colophon(results: dict[str, Any]) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    words = f"{environment['device']}, {versions}, {results['date'][:10]}, "
    words += f"{len(results['settings']['prompts'])} prompts. Command: "
    program, *arguments = results["command"]
    installed = Path(program).name in ("quartz", "__main__.py")
    command = " ".join(["quartz" if installed else f"python {program}", *arguments])
    return pages.section(
        "How it was made", f"<p>{pages.text(words)}<code>{pages.text(command)}</code></p>"
    )
