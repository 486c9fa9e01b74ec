"""Pillow's images to what models take, and back."""

import numpy as np
from PIL import Image

# Pillow's modes that its conversion to RGB keeps whole: others are deeper, and clipped.
_SHALLOW = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")


def check_mode(image: Image.Image, name: str = "image") -> None:
    """Raise ValueError for what is no image of Pillow's, or changes unseen on its way to RGB.

    Args:
      image: as given.
      name: of the argument, for errors.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is a {type(image).__name__}; give an image of Pillow's")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        # What lies under transparent pixels is never seen, and would become the picture.
        if image.convert("RGBA").getextrema()[3][0] < 255:
            raise ValueError(f"{name} has transparent pixels; put it on a colour first")
    elif image.mode not in _SHALLOW:
        raise ValueError(
            f"{name} has mode {image.mode!r}, deeper than 8 bits; scale it to 8 bits a channel "
            "first"
        )


def to_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Return an image resized as diffusers does it, float32 [height, width, 3] in -1..1."""
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    return 2 * (np.asarray(resized, np.float32) / 255) - 1


def to_pil(image: np.ndarray) -> Image.Image:  # float32 [height, width, 3] in 0..1
    """Return an 8-bit image, rounded to nearest."""
    return Image.fromarray(np.round(255 * image).astype(np.uint8))
