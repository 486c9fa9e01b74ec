"""FID, CLIP score and LPIPS: the published protocol, through network files of the user's own.

The protocol is the one of SVDQuant's evaluation (arXiv 2411.05007, deepcompressor's
app/diffusion/eval), which is what 4-bit diffusion transformers are compared by. The networks are
those of torch-fidelity, transformers and torchmetrics, in the optional extra "published"; weights
are read from files, nothing is downloaded.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from quartz_jax.io.files import hash_file, hash_files
from quartz_jax.io.images import to_bytes

_SIDE = 299  # pixels, of Inception's input
_BATCH = 16  # images at a time
_LAYER = "2048"  # the features that FID is made of, by torch-fidelity's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedNetworks:
    """The networks that were given, and what tells them from others."""

    inception: "Inception | None"  # for FID
    clip: "Clip | None"  # for CLIP score
    lpips: "Lpips | None"
    hashes: dict[str, str]  # SHA-256 of the files of each


def open_networks(
    inception: Path | None, clip: Path | None, lpips: Path | None
) -> PublishedNetworks:
    """Load the networks whose files are given.

    Args:
      inception: torch-fidelity's weights-inception-2015-12-05-6726825d.pth.
      clip: a folder in transformers' layout, such as openai/clip-vit-large-patch14's.
      lpips: torchvision's alexnet-owt-7be5be79.pth; LPIPS' own weights are torchmetrics'.

    Raises:
      ValueError: the extra isn't installed, a file is missing or holds another network.
    """
    if inception or clip or lpips:
        import_libraries()
    hashes = {name: hash_file(x) for name, x in (("inception", inception), ("lpips", lpips)) if x}
    if clip:
        hashes["clip"] = hash_files(clip, "*")
    return PublishedNetworks(
        inception=Inception(inception) if inception else None,
        clip=Clip(clip) if clip else None,
        lpips=Lpips(lpips) if lpips else None,
        hashes=hashes,
    )


def import_libraries() -> None:
    """Import what the extra installs.

    Beside a CPU build of torch PyPI's torchvision, which needs CUDA for its compiled operators,
    stops at two that its Python part takes for granted. No metric uses them: they are declared.

    Raises:
      ValueError: the extra isn't installed.
    """
    try:
        import torch

        try:
            import torchvision
        except RuntimeError:
            for name in ("nms", "qnms"):
                form = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{name}", form)
            import torchvision
        import torch_fidelity
        import torchmetrics

        _ = torchvision, torch_fidelity, torchmetrics
    except ModuleNotFoundError as error:
        raise ValueError(
            f"FID, CLIP score and LPIPS need {error.name}; run: pip install -e '.[published]'"
        ) from None


class Inception:
    """The Inception-v3 that FID looks through (Heusel et al., arXiv 1706.08500)."""

    def __init__(self, path: Path):
        from torch_fidelity import FeatureExtractorInceptionV3

        _read_weights(path)  # the library would unpickle any object
        try:
            network = FeatureExtractorInceptionV3("inception-v3", [_LAYER], str(path))
        except (RuntimeError, TypeError) as error:
            raise _other_network(
                path, "FID's Inception, as torch-fidelity names it", error
            ) from None
        self._network = network.to(_device())

    def features(self, images: Iterable[np.ndarray]) -> np.ndarray:
        """Return features float32 [n, 2048] of images, uint8 [h, w, 3] of any sizes.

        As clean-fid has it (Parmar et al., arXiv 2104.11222), whole images are resized to 299
        pixels by Pillow's antialiased bicubic filter, whatever their shape, but rounded to 8 bits
        after it, which torch-fidelity wants.
        """
        import torch

        resized, parts = map(_resize, images), []
        while chunk := list(itertools.islice(resized, _BATCH)):
            pixels = torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                parts.append(self._network(pixels.to(_device()))[0].cpu().numpy())
        return np.concatenate(parts)


class Clip:
    """A CLIP model of transformers: both encoders, tokenizer and image processor."""

    def __init__(self, folder: Path):
        import torch
        from transformers import CLIPModel, CLIPProcessor

        _check_clip(folder)
        try:
            # With loading info it gives two things, which its types don't know.
            loaded: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
            self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise _other_network(folder, "a CLIP model with its processor", error) from None
        self._model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{folder} lacks {len(missing)} tensors of a CLIP model: {missing[0]}")
        self._model.eval().to(_device())

    def score(
        self,
        images: np.ndarray,  # [n, h, w, 3], floats in 0..1
        prompts: list[str],  # n
    ) -> np.ndarray:
        """Return 100 max(cos(image, prompt), 0) for each pair, float32 [n].

        Hessel et al., arXiv 2104.08718, with torchmetrics' factor. Images are rounded to 8 bits;
        a prompt longer than the model takes is cut and keeps its end token.
        """
        import torch

        inputs = self._processor(
            text=prompts,
            images=list(to_bytes(images)),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
        )
        with torch.inference_mode():
            found = self._model(**inputs.to(_device()))
        cosine = (found.image_embeds * found.text_embeds).sum(-1)  # both are of length one
        return 100 * cosine.clamp(min=0).cpu().numpy()


class Lpips:
    """LPIPS over AlexNet (Zhang et al., arXiv 1801.03924), version 0.1."""

    def __init__(self, path: Path):
        # The public class takes no trunk from a file.
        from torchmetrics.functional.image.lpips import _LPIPS

        self._network = _LPIPS(net="alex", pnet_rand=True)
        names = {
            name: f"features.{name.split('.', 1)[1]}" for name in self._network.net.state_dict()
        }
        weights = _read_weights(path)
        try:
            trunk = {name: weights[source] for name, source in names.items()}
            self._network.net.load_state_dict(trunk)
        except (KeyError, RuntimeError) as error:
            raise _other_network(path, "torchvision's AlexNet", error) from None
        self._network.to(_device())

    def distance(
        self,
        images: np.ndarray,  # [n, h, w, 3], floats in 0..1
        reference: np.ndarray,  # the same shape
    ) -> np.ndarray:
        """Return the distance of each pair, float32 [n]."""
        import torch

        def pixels(x):
            return torch.tensor(x, dtype=torch.float32, device=_device()).permute(0, 3, 1, 2)

        with torch.inference_mode():
            found = self._network(pixels(images), pixels(reference), normalize=True)
        return found[:, 0, 0, 0].cpu().numpy()


def frechet_distance(
    features: np.ndarray,  # [n, d]
    others: np.ndarray,  # [m, d]
) -> float:
    """Return the Frechet distance of the normal distributions fitted to two sets of features.

    |m1 - m2|**2 + tr(S1 + S2 - 2 (S1 S2)**(1/2)), Heusel et al., arXiv 1706.08500, equation 6, from
    torch-fidelity; rounding of what is zero is kept from going below it.

    Raises:
      ValueError: a set has fewer than two rows.
    """
    import torch
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    if min(len(features), len(others)) < 2:
        raise ValueError(f"FID needs two images or more, not {len(features)} and {len(others)}")
    statistics = [
        fid_features_to_statistics(torch.from_numpy(np.asarray(x, np.float64)))
        for x in (features, others)
    ]
    return max(0.0, fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def _resize(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _read_weights(path: Path) -> dict[str, Any]:
    """Return tensors by name from a .pth file, with torch's loader that runs no code."""
    import pickle

    import torch

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise _other_network(path, "weights saved by torch", error) from None
    return weights if isinstance(weights, dict) else {}


def _check_clip(folder: Path) -> None:
    """Raise ValueError unless a folder's config.json is of a CLIP model with both encoders."""
    path = folder / "config.json"
    try:
        kind = json.loads(path.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} can't be read: {error}") from None
    if kind != "clip":
        raise ValueError(f"{path} is of a {kind!r} model; give a folder of a whole CLIP, 'clip'")


def _other_network(path: Path, wanted: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{path} doesn't hold {wanted}: {reason[:200]}")
