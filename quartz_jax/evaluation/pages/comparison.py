"""The report of a comparison: images first, then plots, then the table."""

import functools
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from quartz_jax.evaluation.metrics import bootstrap_interval
from quartz_jax.evaluation.pages import html as pages
from quartz_jax.evaluation.results import COLUMNS, ImageStore, cell

_ERROR_GAIN = 4  # of error maps, so that small errors show
_FAMILIES = {"svdquant": "C3", "quartz": "C0", "w4a": "C0", "nvfp4": "C2", "mxfp4": "C4"}
_FAMILIES |= {"sdr": "C5", "int": "C1", "w8a8": "C7"}
# From most to least telling; the first that the results hold sorts the images.
_ORDER = ("lpips", "stlpips", "ssim", "psnr")
# What the plots by layer and timestep show, if the results hold any of them.
_CORE = ("quartz", "quartz-integer", "int4", "int4-g64", "mxfp4", "nvfp4")
_CORE += ("rotate+quartz-integer", "svdquant+int4-g64", "svdquant+quartz", "svdquant+nvfp4")
_RISING = {"lpips": True, "stlpips": True, "ssim": False, "psnr": False}  # whether more is worse
_TITLES = {"lpips": "LPIPS to bf16", "stlpips": "ST-LPIPS to bf16"}
_TITLES |= {"ssim": "SSIM to bf16", "psnr": "PSNR to bf16, dB"}


def comparison_page(results: dict[str, Any], images: Path, note: str = "", links: str = "") -> str:
    """Return the page of a results file.

    Args:
      results: what evaluate.py wrote, with at least one finished recipe besides bf16.
      images: the folder of images beside it, one folder a recipe.
      note: a paragraph to put first, in plain text.
      links: HTML with links to pages that belong to it.

    Raises:
      ValueError: no recipe is finished, or bf16's images are missing.
    """
    done = {n: e for n, e in results["recipes"].items() if e.get("summary")}
    compared = {n: e for n, e in done.items() if e["summary"]["weight_bits"] < 16}
    if not compared or "bf16" not in done:
        raise ValueError("the report needs bf16 and at least one finished recipe; evaluate them")
    metric = next(m for m in _ORDER if m in next(iter(compared.values()))["scores"])
    prompts = results["settings"]["prompts"]
    load = functools.cache(lambda n: ImageStore(images / _folder(n)).load(len(prompts)))
    ranked = sorted(compared, key=lambda n: _badness(compared[n], metric).mean())
    return pages.page(
        f"{results['settings']['model']}: {len(compared)} ways to quantize it",
        pages.paragraph(note, "lead") if note else "",
        pages.paragraph(standing(compared, metric), "lead"),
        links,
        _same_prompts(compared, ranked, metric, prompts, load),
        _scatter(compared, metric),
        _by_layer_and_step(compared, ranked),
        _cases(compared, ranked, metric, prompts, load),
        _table(done, ranked),
        _colophon(results),
    )


def standing(compared: dict[str, Any], metric: str) -> str:
    """Return where QuaRTZ stands against the rivals, from paired differences of the figures."""
    own = [n for n in ("quartz", "quartz-integer", "w4a4", "w4a4x") if n in compared]
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


def _folder(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _colour(name: str) -> str:
    return next((c for word, c in _FAMILIES.items() if word in name), "C6")


def _same_prompts(compared, ranked, metric, prompts, load) -> str:
    """The prompts that are easiest, typical and hardest over all methods, for every method."""
    mean = np.mean([_badness(entry, metric) for entry in compared.values()], axis=0)
    order = np.argsort(mean)
    parts = []
    picks = {"easiest": order[0], "typical": order[len(order) // 2], "hardest": order[-1]}
    for word, i in picks.items():
        cards = [pages.image(load("bf16")[i], "bf16")]
        for name in ranked:
            figure = compared[name]["scores"][metric][i]
            cards.append(pages.image(load(name)[i], f"{name} · {figure:.3f}"))
        parts.append(f"<p><b>{word}</b>: “{pages.text(prompts[i])}”</p>")
        parts.append(f"<div class=wall>{''.join(cards)}</div>")
    words = f"From the same noise. Under each picture its {_TITLES[metric]}; best methods first."
    return pages.section("The same three prompts, every method", pages.paragraph(words), *parts)


def _scatter(compared, metric) -> str:
    figure, axes = pages.new_figure(11, max(5, 0.19 * len(compared)))
    axis = axes[0, 0]
    order = sorted(compared, key=lambda name: compared[name]["summary"][metric]["mean"])
    for place, name in enumerate(order):
        value, x = compared[name]["summary"][metric], _bits(compared[name])
        y, colour = value["mean"], _colour(name)
        spread = [[y - value["low"]], [value["high"] - y]]
        axis.errorbar(x, y, yerr=spread, fmt="o", color=colour, markersize=5, linewidth=1)
        # Names stand in a column at the right, in the points' order, so that none lies on another.
        height = (place + 0.5) / len(order)
        axis.annotate(
            name,
            (x, y),
            (1.04, height),
            textcoords="axes fraction",
            fontsize=7,
            va="center",
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.6},
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


def _by_layer_and_step(compared, ranked, most: int = 10) -> str:
    shown = [n for n in ranked if "sqnr" in compared[n]]
    core = [n for n in shown if n in _CORE] or shown[:most]
    if not core:
        return ""
    figure, axes = pages.new_figure(11, 7)
    axis, layers = axes[0, 0], list(compared[core[0]]["sqnr"])
    for name in core:
        values = [compared[name]["sqnr"].get(layer, np.nan) for layer in layers]
        axis.plot(values, ".-", label=name, linewidth=1)
    axis.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    axis.set(ylabel="SQNR of the layer's output, dB")
    axis.legend(fontsize=7, ncols=3)
    axis.grid(alpha=0.25)
    layer_words = "Each layer on the 16-bit model's own inputs: no error from layers before it."
    first = pages.plot(figure, layer_words)
    figure, axes = pages.new_figure(9, 4.5)
    for name in core:
        entry = compared[name]
        axes[0, 0].plot(
            entry["sigmas"], np.mean(entry["velocity"], axis=1), ".-", label=name, linewidth=1
        )
    axes[0, 0].set(xlabel="noise level, 1 (noise) to 0", ylabel="|v - v16| / |v16|", yscale="log")
    axes[0, 0].invert_xaxis()
    axes[0, 0].legend(fontsize=7, ncols=3)
    step_words = "One step from the 16-bit model's latents: error of the predicted velocity."
    return pages.section("By layer and by timestep", first, pages.plot(figure, step_words))


def _cases(compared, ranked, metric, prompts, load) -> str:
    parts = []
    for name in ranked:
        order = np.argsort(_badness(compared[name], metric))
        picks = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        rows = []
        for word, i in picks.items():
            pair = (load("bf16")[i], load(name)[i])
            score = compared[name]["scores"][metric][i]
            label = textwrap.shorten(f"{word}, {score:.3f}: {prompts[i]}", 90)
            rows.append(_case(pair, label))
        parts.append(f"<details><summary>{pages.text(name)}</summary>{''.join(rows)}</details>")
    words = (
        f"Each method's own best, median and worst case by {_TITLES[metric]}: bf16, the method, "
        f"the absolute error times {_ERROR_GAIN}, and a crop of both where the error is largest."
    )
    return pages.section("Best, median, worst", pages.paragraph(words), *parts)


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


def _table(done, ranked) -> str:
    rows = [done[name]["summary"] for name in ("bf16", *ranked)]
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    body = [[cell(key, row.get(key)) for key in columns] for row in rows]
    return pages.section("The table", pages.table(list(columns.values()), body))


def _colophon(results: dict[str, Any]) -> str:
    environment = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    words = f"{environment['device']}, {versions}, {results['date'][:10]}, "
    words += f"{len(results['settings']['prompts'])} prompts. Command: "
    command = f"<code>python {pages.text(' '.join(results['command']))}</code>"
    return pages.section("How it was made", f"<p>{pages.text(words)}{command}</p>")
