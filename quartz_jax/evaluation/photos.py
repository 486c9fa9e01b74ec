"""Real images to compare with: one .npz file, or a folder of image files."""

import io
from collections.abc import Sequence
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


def find_photos(folder: Path, names: Sequence[str] | None) -> list[Path]:
    """Return the image files of a folder: those named, or all below it, sorted.

    Args:
      folder: where they are.
      names: paths below the folder, as `evaluation.prompts` gives them; None for all.

    Raises:
      ValueError: a named file is absent, or there are fewer than two.
    """
    known = Image.registered_extensions()
    found = (
        [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known]
        if names is None
        else [folder / name for name in names]
    )
    if missing := [path for path in found if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing, and {len(missing) - 1} more of {len(found)}")
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} real images; FID needs two or more")
    return found
