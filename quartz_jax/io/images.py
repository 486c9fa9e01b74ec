"""Images as bytes and files, and grids of them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from quartz_jax.io.files import atomic_file

_LABEL_HEIGHT = 20  # pixels


def grid(
    rows: Sequence[Sequence[np.ndarray]],  # [height, width, 3] each, floats in 0..1, one size
    labels: Sequence[str] = (),  # one a column, or none
) -> Image.Image:
    """Return images laid out in rows, with a line of labels above if there are any."""
    height, width, _ = rows[0][0].shape
    top = _LABEL_HEIGHT if labels else 0
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * width, top + len(rows) * height), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            sheet.paste(Image.fromarray(to_bytes(image)), (j * width, top + i * height))
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(labels):
        draw.text((j * width + 4, 3), label, "black", ImageFont.load_default(12))
    return sheet


def square(
    items: Sequence[Sequence[np.ndarray]],  # images that stay side by side, as many in each item
) -> list[list[np.ndarray]]:
    """Return the rows of an almost square grid."""
    columns = math.ceil(math.sqrt(len(items) / len(items[0])))
    starts = range(0, len(items), columns)
    return [[image for item in items[i : i + columns] for image in item] for i in starts]


def read_image(path: Path) -> Image.Image:
    """Read an image of any format that Pillow knows, upright, RGB.

    Raises:
      ValueError: it can't be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} can't be read: {error}") from None


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; the file appears complete or not at all, and holds no time stamp."""
    with atomic_file(path) as partial:
        image.save(partial, format="PNG")


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Return floats in 0..1 of any shape as uint8, the nearest."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
