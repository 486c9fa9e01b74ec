"""Photographs by class: a folder of `train_*.npz` and `classes.json`.

An .npz holds `blob` (image files end to end), `off` (int64 [n + 1] offsets into it) and `label`
(int16 [n], an index into the list in `classes.json`, whose entries have a `name`).
"""

import dataclasses
import io
import json
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photos:
    """Photographs with their classes, whole in memory."""

    images: np.ndarray  # uint8 [n, height, width, 3]
    labels: np.ndarray  # int32 [n], indices into classes
    classes: list[dict[str, Any]]  # of classes.json


def check_photos(folder: Path) -> None:
    """Raise ValueError unless a folder holds what `read_photos` reads."""
    wanted = [x for x in ("classes.json", "train_*.npz") if not list(folder.glob(x))]
    if wanted:
        raise ValueError(f"{folder} holds no {' and no '.join(wanted)}; give a folder of photos")


def read_classes(folder: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Return entries of classes.json, each with a `name`: `count` spread over all, or all.

    Raises:
      ValueError: it holds something else.
    """
    path = folder / "classes.json"
    try:
        classes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(classes, list) or not all("name" in entry for entry in classes):
        raise ValueError(f"{path} must hold a list of objects, each with a name")
    return [classes[i] for i in _spread(len(classes), count)]


def read_photos(folder: Path, count: int | None = None, files: str = "train_*.npz") -> Photos:
    """Decode the photos of a folder.

    Args:
      folder: as `check_photos` wants it.
      count: classes to take, spread evenly over all; None for all.
      files: pattern of the names of files.

    Raises:
      ValueError: a file is damaged, or none holds a photo of these classes.
    """
    chosen = _spread(len(read_classes(folder)), count)
    images, labels = [], []
    for path in sorted(folder.glob(files)):
        blob, offsets, label = _read(path)
        kept = np.flatnonzero(np.isin(label, chosen))
        if not len(kept):  # a file of other classes
            continue
        images.append(decode(blob, offsets, kept))
        labels.append(np.searchsorted(chosen, label[kept]).astype(np.int32))
    if not images:
        raise ValueError(f"{folder}: {files} holds no photo of the {len(chosen)} classes")
    return Photos(
        images=np.concatenate(images),
        labels=np.concatenate(labels),
        classes=read_classes(folder, count),
    )


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return blob, offsets and labels of a file."""
    try:
        with np.load(path) as file:
            return file["blob"], file["off"], file["label"]
    except (KeyError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no photos: {error}") from None


def _spread(total: int, count: int | None) -> np.ndarray:
    """Return `count` of the numbers below `total`, evenly spread; None for all."""
    return np.arange(count or total) * total // (count or total)


def decode(blob: np.ndarray, offsets: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
    """Decode image files that lie end to end, uint8 [n, height, width, 3].

    Args:
      blob: uint8, the files.
      offsets: int64 [files + 1].
      indices: which of them; None for all.
    """

    def read(index: int) -> np.ndarray:
        data = blob[offsets[index] : offsets[index + 1]].tobytes()
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    which = range(len(offsets) - 1) if indices is None else indices
    with ThreadPoolExecutor() as pool:
        return np.stack(list(tqdm(pool.map(read, which), "decode", len(which))))
