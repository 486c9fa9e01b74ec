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
    """Read an image of any format that Pillow knows, upright, RGB of 8 bits.

    Greys of 16 bits are scaled. Transparent pixels are put on white, as what is hidden under them
    was never seen.

    Raises:
      ValueError: it can't be read, or its pixels are numbers whose range the file doesn't say.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"image {path} can't be read: it is no regular file")
    try:
        with Image.open(path) as image:
            shallow = _to_8_bits(ImageOps.exif_transpose(image), image.format)
            return _on_white(shallow) if shallow.has_transparency_data else shallow.convert("RGB")
    except Exception as error:  # Pillow raises whatever its readers happen to
        told = str(error) or type(error).__name__
        raise ValueError(f"image {path} can't be read: {told}") from None


def _to_8_bits(image: Image.Image, format: str | None) -> Image.Image:
    """Return greys of 16 bits scaled to 8, others as they are.

    Raises:
      ValueError: pixels are integers of 32 bits or floats.
    """
    # Of PNG and PGM, Pillow may give 16 bits in a mode of 32.
    if image.mode == "F" or (image.mode == "I" and format not in ("PNG", "PPM")):
        raise ValueError(
            f"its pixels are numbers of 32 bits (mode {image.mode}), whose range isn't known; save "
            "it with 8 or 16 bits a channel"
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    deep = np.asarray(image).astype(np.int64)
    scaled = Image.fromarray(np.clip((deep + 128) // 257, 0, 255).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled.putalpha(Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _on_white(image: Image.Image) -> Image.Image:
    """Return an image with transparent pixels on white; an opaque one keeps every value."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; the file appears complete or not at all, and holds no time stamp."""
    with atomic_file(path) as partial:
        image.save(partial, format="PNG")


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Return floats in 0..1 of any shape as uint8, the nearest."""
    return np.round(np.clip(images, 0, 1) * 255).astype(np.uint8)
