"""A page of the paper's analyses: what held first, then a plot for each."""

import numpy as np

from quartz_jax.evaluation.analysis import FORMATS, GROUP_SIZES, LayerAnalysis, findings
from quartz_jax.evaluation.pages import html as pages


def analysis_page(layers: list[LayerAnalysis], title: str, made: str, command: str) -> str:
    """Return the page.

    Args:
      layers: in the model's order, at least one.
      title: of the page.
      made: device, versions, date and prompts, in words.
      command: that made it; stands under every plot.
    """
    rows = [
        [claim, "held" if held else "didn't hold", figures]
        for claim, held, figures in findings(layers)
    ]
    list_ = "".join(
        f"<li><b>{pages.text(word)}</b>: {pages.text(claim)} — {pages.text(figures)}</li>"
        for claim, word, figures in rows
    )
    source = f"<p class=small>{pages.text(made)} <code>{pages.text(command)}</code></p>"
    plots = [_shifts(layers), _entropy(layers), _errors(layers), _condition(layers)]
    plots.append(_group_sizes(layers))
    return pages.page(
        title,
        pages.section("What held and what didn't", f"<ul>{list_}</ul>", source),
        *(pages.section(heading, plot, source) for heading, plot in plots),
    )


def _bars(axis, layers: list[LayerAnalysis]) -> np.ndarray:
    places = np.arange(len(layers))
    axis.set_xticks(places, [x.path for x in layers], rotation=90, fontsize=6)
    return places


def _shifts(layers) -> tuple[str, str]:
    figure, axes = pages.new_figure(11, 6)
    axis, base = axes[0, 0], np.zeros(len(layers))
    places = _bars(axis, layers)
    colours = ("#d7e8ff", "#9cc4f8", "#5c9bea", "#2a6bc4", "#123c78")
    for shift, colour in enumerate(colours):
        share = np.array([x.shift_shares[shift] for x in layers])
        axis.bar(places, share, bottom=base, color=colour, label=f"shift {shift}", width=0.9)
        base += share
    axis.set(ylabel="share of groups of 16")
    axis.legend(ncols=5, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    caption = "Low bits that a group drops: 0 keeps the 8-bit values as they are."
    return "Shifts by layer", pages.plot(figure, caption)


def _entropy(layers) -> tuple[str, str]:
    figure, axes = pages.new_figure(11, 4, columns=2)
    left, right = axes.ravel()
    names = ("sign", "4", "2", "1")
    for name, offset in {"quartz": -0.2, "int4": 0.2}.items():
        bits = np.mean([x.bit_entropy[name] for x in layers], axis=0)
        left.bar(np.arange(4) + offset, bits, 0.38, label=name)
        right.plot([x.code_entropy[name] for x in layers], ".-", label=name, linewidth=1)
    left.set_xticks(range(4), names)
    left.set(xlabel="bit of the code (sign and magnitude)", ylabel="entropy, bits", ylim=(0, 1.05))
    right.set(xlabel="layer, in the model's order", ylabel="entropy of a code, bits of 4")
    left.legend()
    caption = "Left: mean over layers of each bit's entropy. Right: of whole codes, layer by layer."
    return "Entropy of the codes, QuaRTZ against INT4", pages.plot(figure, caption)


def _errors(layers) -> tuple[str, str]:
    figure, axes = pages.new_figure(11, 4.2, columns=2)
    for axis, field in zip(axes.ravel(), ("near_zero", "outliers"), strict=True):
        for name in FORMATS:
            values = [getattr(x, field)[name] for x in layers]
            axis.plot(values, ".-", label=name, linewidth=1)
        axis.set(xlabel="layer", ylabel="RMS error, 8-bit steps", yscale="log")
        axis.set_title("|m| < 8" if field == "near_zero" else "largest 1 % of a layer")
    axes.ravel()[0].legend(fontsize=7)
    caption = "Rounding error of small values and of outliers, in steps of the 8-bit stage."
    return "Error near zero and at outliers", pages.plot(figure, caption)


def _condition(layers) -> tuple[str, str]:
    figure, axes = pages.new_figure(11, 4.5, columns=2)
    left, right = axes.ravel()
    large = [x.large for x in layers]
    ratio = [x.mean_error["quartz"] / x.mean_error["int4"] for x in layers]
    left.scatter(large, ratio, s=16)
    left.axvline(0.5, color="C3", linestyle="--", linewidth=1)
    left.axhline(1, color="C7", linestyle="--", linewidth=1)
    left.set(xlabel="P(|m| >= 8)", ylabel="mean error, QuaRTZ / INT4")
    for name in ("quartz-truncate", "quartz"):
        right.scatter(
            [x.bound for x in layers], [x.mean_error[name] for x in layers], s=16, label=name
        )
    end = max(x.bound for x in layers)
    right.plot([0, end], [0, end], color="C7", linestyle="--", linewidth=1, label="the bound")
    right.set(xlabel="16 P(|m| >= 8), steps", ylabel="mean error, steps")
    right.legend(fontsize=7)
    blind = np.mean([x.shared for x in layers])
    caption = (
        "A dot is a layer. Left: the theorem promises ratios below one left of 0.5. Right: the "
        "bound takes values below 8 to be exact, but a group shares the shift of its largest "
        f"value: {100 * blind:.0f} % of the non-zero values below 8 lie beside a larger one."
    )
    return "The theorem's condition, its bound and its blind spot", pages.plot(figure, caption)


def _group_sizes(layers) -> tuple[str, str]:
    figure, axes = pages.new_figure(8, 4)
    axis, sizes = axes[0, 0], np.array([x.by_group_size for x in layers])
    for row in sizes:
        axis.plot(GROUP_SIZES, row, color="C7", linewidth=0.5, alpha=0.6)
    axis.plot(GROUP_SIZES, sizes.mean(axis=0), "o-", color="C0", label="mean of the layers")
    axis.set(xlabel="group size", ylabel="|x - x'|² / |x|²", yscale="log")
    axis.set_xticks(GROUP_SIZES, GROUP_SIZES)
    axis.legend()
    caption = "Relative squared error of the inputs against the group size, a grey line a layer."
    return "Group size", pages.plot(figure, caption)
