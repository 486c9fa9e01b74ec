"""What is said of images: figures of each, and of all of a recipe against real ones."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quartz_jax import schema
from quartz_jax.evaluation import metrics_torch
from quartz_jax.evaluation.metrics import bootstrap_interval, kernel_distance, psnr, ssim
from quartz_jax.evaluation.metrics_jax import FILES, ImageNetworks
from quartz_jax.evaluation.photos import find_photos, read_photos
from quartz_jax.evaluation.prompts import Prompts
from quartz_jax.evaluation.results import ImageStore, class_of_prompts
from quartz_jax.io.files import atomic_file, hash_file, hash_files, read_json
from quartz_jax.io.images import read_image, to_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Class:
    """A class that prompts name."""

    name: str  # as prompts have it
    in1k: int  # its index in ImageNet-1k

    def __post_init__(self):
        if not self.name.strip() or not 0 <= self.in1k < 1000:
            raise ValueError(f"name is {self.name!r}, in1k {self.in1k}; it must be 0 to 999")


class Judges:
    """The metric networks and the real images of a comparison, opened before any work.

    Args:
      prompts: of the comparison.
      beside: gives the path of a file beside the results.
      networks: folder of the converted networks; without them their metrics are left out.
      real: .npz of real images, for KID; or a folder, for FID; or None.
      real_count: images of the .npz, drawn at random.
      inception: torch-fidelity's weights, for FID; or None.
      clip: folder of a CLIP model, for CLIP score; or None.
      lpips: torchvision's AlexNet, for LPIPS; or None.
      classes: JSON list of the prompts' classes; or None.

    Raises:
      ValueError: one of them can't be used.
    """

    def __init__(
        self,
        prompts: Prompts,
        beside: Callable[[str], Path],
        *,
        networks: Path,
        real: Path | None,
        real_count: int,
        inception: Path | None,
        clip: Path | None,
        lpips: Path | None,
        classes: Path | None,
    ):
        self.prompts, self.beside = prompts.texts, beside
        self.published = metrics_torch.open_networks(inception, clip, lpips)
        in_files = real is not None and real.is_dir()
        self.real_files = find_photos(real, prompts.images) if real and in_files else []
        self.networks = _open_networks(networks)
        self.real = read_photos(real, real_count) if real and not in_files else None
        self.labels = _read_labels(classes, prompts.texts)
        if self.networks is None and (given := classes or (None if in_files else real)):
            raise ValueError(
                f"{given} is for networks, and {networks} holds none; make them with "
                "scripts/convert_metric_networks.py"
            )
        hashes = hash_files(networks, "*.safetensors") if self.networks else None
        self.settings: dict[str, Any] = {"networks": hashes}
        self.settings |= {"real": _hash_of(real), "classes": _hash_of(classes)}
        self.settings |= {"real_count": real_count} if self.real is not None else {}
        self.settings |= self.published.hashes

    def prepare(self, originals: Iterable[np.ndarray]) -> None:
        """Make the features that several processes need, and keep them beside the results.

        Args:
          originals: the 16-bit model's images, as `overall` takes them.
        """
        if self.published.inception:
            self._bf16_inception(originals)
            _ = self._real_inception if self.real_files else None

    def measure(
        self,
        start: int,
        images: np.ndarray,  # [batch, h, w, 3], floats in 0..1
        originals: np.ndarray,  # the same shape
    ) -> dict[str, np.ndarray]:
        """Return what is measured image by image, [batch] each.

        Args:
          start: index of the first image's prompt.
          images: to judge.
          originals: the 16-bit model's.
        """
        figures = {"psnr": psnr(images, originals), "ssim": ssim(images, originals)}
        if self.networks is not None:
            figures["stlpips"] = self.networks.distance(images, originals)
        if self.published.lpips:
            figures["lpips"] = self.published.lpips.distance(images, originals)
        if self.published.clip:
            prompts = self.prompts[start : start + len(images)]
            figures["clip"] = self.published.clip.score(images, prompts)
        return figures

    def overall(
        self, name: str, store: ImageStore, originals: Iterable[np.ndarray] | None
    ) -> dict[str, Any]:
        """Return the figures of all images of a row.

        Args:
          name: of the row, for progress bars.
          store: its images.
          originals: the 16-bit model's, [batch, h, w, 3] in 0..1 each; None if the row is them.
        """
        return self._against_photos(store) | self._frechet_distances(name, store, originals)

    def _against_photos(self, store: ImageStore) -> dict[str, Any]:
        """Return KID against real images and agreement with the prompts' classes, where given."""
        if self.networks is None or (self.real is None and self.labels is None):
            return {}
        features, logits = self.networks.features(store.load(len(self.prompts)))
        more = {}
        if self.real is not None:
            more["kid"] = vars(kernel_distance(features, self._real_features))
        if self.labels is not None:
            classes, wanted = self.labels
            hits = classes[np.argmax(logits[:, classes], axis=1)] == wanted
            more["agreement"] = vars(bootstrap_interval(hits.astype(float)))
        return more

    def _frechet_distances(
        self, name: str, store: ImageStore, originals: Iterable[np.ndarray] | None
    ) -> dict[str, float]:
        """Return FID against the real images, if given, and against the 16-bit model's."""
        if self.published.inception is None:
            return {}
        count, more = len(self.prompts), {}
        images = tqdm(store.images(count), name, count, unit="feature")
        features = self.published.inception.features(images)
        if self.real_files:
            more["fid"] = metrics_torch.frechet_distance(features, self._real_inception)
        if originals is not None:
            others = self._bf16_inception(originals)
            more["fid_to_bf16"] = metrics_torch.frechet_distance(features, others)
        return more

    @functools.cached_property
    def _real_features(self) -> np.ndarray:
        """Features of the real images, [n, 1280]."""
        assert self.networks is not None and self.real is not None
        return self.networks.features(self.real)[0]

    @functools.cached_property
    def _real_inception(self) -> np.ndarray:
        """Inception's features of the real images, [n, 2048]."""
        images = (np.asarray(read_image(path)) for path in self.real_files)
        return self._inception_features("real", images, len(self.real_files))

    def _bf16_inception(self, originals: Iterable[np.ndarray]) -> np.ndarray:
        """Return Inception's features of the 16-bit model's images, [n, 2048]."""
        images = (image for batch in originals for image in to_bytes(batch))
        return self._inception_features("bf16", images, len(self.prompts))

    def _inception_features(self, name: str, images: Iterable, count: int) -> np.ndarray:
        """Return Inception's features, from the file beside the results if it is there."""
        path = self.beside(f"{name}.npy")
        if not path.exists():
            assert self.published.inception is not None
            images = tqdm(images, f"{name} images", count, unit="feature")
            features = self.published.inception.features(images)
            with atomic_file(path) as partial, partial.open("wb") as file:
                np.save(file, features)
        return np.load(path)


def _open_networks(folder: Path) -> ImageNetworks | None:
    """Return the metric networks; None, with a word about it, if they were never converted."""
    if any((folder / name).exists() for name in FILES.values()):
        return ImageNetworks(folder)
    print(
        f"{folder} holds no metric networks: no ST-LPIPS, KID and class agreement "
        "(scripts/convert_metric_networks.py makes them)",
        file=sys.stderr,
    )
    return None


def _read_labels(path: Path | None, prompts: list[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return all classes, and the one of each prompt, as ImageNet-1k indices."""
    if path is None:
        return None
    found = read_json(path)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} must be a JSON list of classes, each with name and in1k")
    classes = [schema.from_larger(_Class, x, f"{path}[{i}]") for i, x in enumerate(found)]
    indices = np.array([entry.in1k for entry in classes])
    return indices, indices[class_of_prompts(prompts, [entry.name for entry in classes])]


def _hash_of(path: Path | None) -> str | None:
    """Return a hash of a file, or of the names and sizes of a folder's."""
    if path is None:
        return None
    if path.is_file():
        return hash_file(path)
    sizes = [(x.relative_to(path).as_posix(), x.stat().st_size) for x in sorted(path.rglob("*"))]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
