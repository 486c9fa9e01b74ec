"""Self-contained HTML pages: inline images and vector plots, no scripts, nothing fetched."""

import base64
import html
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quartz_jax.io.files import atomic_file

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--accent:#2f6fde}
body{font:16px/1.5 system-ui,sans-serif;max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.9rem;margin:0 0 .3rem}h2{margin:2.6rem 0 .6rem;font-size:1.35rem}
p,figcaption{max-width:75ch}figcaption,.small{font-size:.85rem;opacity:.8}
.lead{font-size:1.1rem;border-left:4px solid var(--accent);padding-left:1rem}
figure{margin:1.2rem 0;overflow-x:auto}
figure.plot{background:#fff;color:#000;border-radius:8px;padding:.6rem}
figure svg{max-width:100%;height:auto}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.82rem;white-space:nowrap}
td,th{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left;position:sticky;left:0;background:Canvas}
tr:hover td{background:var(--soft)}
.wall{display:grid;gap:10px;grid-template-columns:repeat(auto-fill,minmax(132px,1fr))}
.card{font-size:.75rem;overflow-wrap:anywhere}img{width:100%;border-radius:4px;display:block}
img.px{image-rendering:pixelated}
.case{display:grid;gap:8px;grid-template-columns:repeat(5,minmax(110px,1fr));margin:.8rem 0}
details{border-top:1px solid var(--line);padding:.5rem 0}summary{cursor:pointer;font-weight:600}
code{background:var(--soft);padding:.1rem .3rem;border-radius:4px;overflow-wrap:anywhere}
"""


def page(title: str, *parts: str) -> str:
    """Return a whole page."""
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><style>{_STYLE}"
    return (
        f"<!doctype html><html lang=en><head>{head}</style><title>{text(title)}</title></head>"
        f"<body><h1>{text(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def write_page(path: Path, content: str) -> None:
    """Write a page; the file appears complete or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(content, encoding="utf-8")


def text(value: Any) -> str:
    """Return anything as escaped text."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    """Return a heading and what is under it."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def paragraph(words: str, style: str = "") -> str:
    """Return a paragraph of plain text."""
    return f"<p class='{style}'>{text(words)}</p>"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table; the first column stays in sight when it scrolls."""
    lines = ["".join(f"<th>{text(x)}</th>" for x in head)]
    lines += ["".join(f"<td>{text(x)}</td>" for x in row) for row in rows]
    return f"<div class=scroll><table><tr>{'</tr><tr>'.join(lines)}</tr></table></div>"


def folded(title: str, *parts: str) -> str:
    """Return what is only shown once its title is clicked."""
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>"


def image(
    pixels: np.ndarray,  # uint8 [h, w, 3]
    label: str = "",
    zoom: int = 1,
) -> str:
    """Return an inline lossless WebP with a label under it; zoomed pixels stay square."""
    sheet, buffer = Image.fromarray(pixels), io.BytesIO()
    sheet.save(buffer, "WEBP", lossless=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    style = " class=px" if zoom > 1 else ""
    under = f"<br>{text(label)}" if label else ""
    source = f"src='data:image/webp;base64,{data}'"
    return f"<div class=card><img{style} alt='{text(label)}' {source}>{under}</div>"


def plot(figure: Any, caption: str) -> str:
    """Return a matplotlib figure as inline SVG with a caption, and close it."""
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    return f"<figure class=plot>{drawing}<figcaption>{text(caption)}</figcaption></figure>"


def check_plots() -> None:
    """Raise ValueError unless plots can be drawn; for before the work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib; run: pip install -e '.[report]'")


def new_figure(width: float = 10, height: float = 4.5, columns: int = 1) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes, drawn without a display.

    Raises:
      ValueError: matplotlib isn't installed.
    """
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "quartz", "font.size": 9}
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    # What stands between dollar signs in a name is no formula.
    matplotlib.rcParams |= {"text.parse_math": False}
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), squeeze=False)
