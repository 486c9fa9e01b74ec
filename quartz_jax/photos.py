"""Real images to compare with, from one .npz file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def read_photos(path: Path, count: int, seed: int = 0) -> np.ndarray:
    """Return `count` images drawn at random (all, if there are fewer), uint8 [n, h, w, 3].

    Args:
      path: holds `blob`, image files end to end as uint8, and `off`, their offsets, int64 [n + 1].
      count: how many.
      seed: of the draw.

    Raises:
      ValueError: the file isn't one, or images differ in size.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            blob, offsets = file["blob"], file["off"]
        total = len(offsets) - 1
        picks = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
        files = (blob[offsets[i] : offsets[i + 1]].tobytes() for i in np.sort(picks))
        return np.stack([np.asarray(Image.open(io.BytesIO(x)).convert("RGB")) for x in files])
    except (KeyError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} holds no usable images: {error}") from None
