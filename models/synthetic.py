"""FLUX.1 checkpoints with random weights: every name, shape and dtype as published, no training.

For testing what is too large to download: conversion, memory and speed at full size. Pictures made
with them are noise.
"""

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from scipy.special import ndtri
from tqdm import tqdm

from models.checkpoint_io import CheckpointError, Rule, TracingRngs, stored_tensors
from models.flux.config import FluxConfig
from models.flux.modeling import FluxTransformer
from models.flux.params import bfl_rules as bfl_transformer_rules
from models.flux.params import diffusers_rules
from models.loading import FLUX_INDEX, flux_scheduler
from models.stored_files import read_json
from models.text_encoders import clip, t5
from models.vae.config import AutoencoderKLConfig
from models.vae.modeling import AutoencoderKL
from models.vae.params import RULES as VAE_RULES
from models.vae.params import bfl_rules as bfl_vae_rules

_DTYPES = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}
_STEPS = 2**16  # quantiles of the normal distribution that weights are drawn from
_SHARD_BYTES = 10**10  # diffusers' largest shard; transformers' is half of it
_MARKER = ".random_weights"  # a file in every folder that is made here, from the start
LAYOUTS = ("diffusers", "bfl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of every component of a FLUX.1 model."""

    transformer: FluxConfig
    clip: clip.CLIPTextConfig
    t5: t5.T5Config
    vae: AutoencoderKLConfig


# What the config.json files of FLUX.1-dev give; schnell differs in guidance_embeds alone.
FLUX_DEV = ModelSizes(
    transformer=FluxConfig(guidance_embeds=True),
    # transformers takes eos_token_id 2 for "the highest id"
    clip=clip.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2
    ),
    t5=t5.T5Config(
        d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    ),
    vae=AutoencoderKLConfig(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
)


def write_random_flux(
    folder: Path | str,
    sizes: ModelSizes = FLUX_DEV,
    *,
    tokenizers: Path | str,
    layout: str = "diffusers",
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write a random FLUX.1 model, one tensor at a time; the same arguments give the same bytes.

    Linears and convolutions are normal with deviation 1 / sqrt(inputs), embeddings and biases with
    0.02, norms one: activations stay of order one.

    Args:
      folder: made here; must not exist.
      sizes: of the components.
      tokenizers: a model folder whose `tokenizer` and `tokenizer_2` are copied, lengthened to what
        FLUX.1 takes; their vocabularies need not fill the encoders'.
      layout: "diffusers" for the whole model, bfloat16, sharded as published; "bfl" for
        flux1-dev.safetensors (flux1-schnell without guidance), bfloat16, and ae.safetensors,
        float32.
      seed: of the weights.
      progress: show a bar on stderr.

    Raises:
      ValueError: an unknown layout.
      CheckpointError: the folder exists, or a tokenizer is missing.
    """
    folder = Path(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; use one of {', '.join(LAYOUTS)}")
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; choose another folder")
    _check_tokenizers(Path(tokenizers))
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()
    write = _Writer(seed=seed, progress=progress)
    if layout == "bfl":
        name = "flux1-dev" if sizes.transformer.guidance_embeds else "flux1-schnell"
        transformer = _tensors(FluxTransformer, sizes.transformer, bfl_transformer_rules())
        vae = _tensors(AutoencoderKL, sizes.vae, bfl_vae_rules(sizes.vae))
        write.file(folder / f"{name}.safetensors", transformer)
        write.file(folder / "ae.safetensors", vae, "F32")
        return
    rules = diffusers_rules(sizes.transformer)
    parts = {
        "transformer": (FluxTransformer, sizes.transformer, rules, _SHARD_BYTES),
        "vae": (AutoencoderKL, sizes.vae, VAE_RULES, _SHARD_BYTES),
        "text_encoder": (
            clip.CLIPTextEncoder,
            sizes.clip,
            clip.checkpoint_rules(),
            _SHARD_BYTES // 2,
        ),
        "text_encoder_2": (t5.T5Encoder, sizes.t5, t5.checkpoint_rules(), _SHARD_BYTES // 2),
    }
    for name, (module, config, part_rules, shard_bytes) in parts.items():
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        tensors = _tensors(module, config, part_rules)
        write.folder(folder / name, tensors, stem, shard_bytes, config.to_json())
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(sizes))
    _copy_tokenizers(Path(tokenizers), folder, sizes)
    _write_json(folder / "model_index.json", FLUX_INDEX)


def is_random_flux(folder: Path) -> bool:
    """Return whether `write_random_flux` made a folder, be it only in part."""
    return (folder / _MARKER).exists()


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], np.ndarray],
    dtype: str = "BF16",
) -> None:
    """Write a safetensors file, one tensor at a time; it gets its name when it is complete.

    The format: github.com/huggingface/safetensors, README, "Format".

    Args:
      path: the file.
      shapes: of its tensors by name, in the order they are written in.
      make: returns a tensor, of its shape and dtype.
      dtype: of all, in the words of the format: "BF16" or "F32".
    """
    size = np.dtype(_DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            stream.write(np.ascontiguousarray(make(name)).view(np.uint8).data)
    partial.replace(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Writer:
    seed: int
    progress: bool

    def folder(self, folder: Path, tensors, stem: str, shard_bytes: int, config: dict) -> None:
        """Write a component folder: one file or shards with an index, and config.json."""
        folder.mkdir()
        shards = _split(tensors, shard_bytes)
        files = [f"{stem}.safetensors"]
        if len(shards) > 1:
            files = [
                f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
            ]
            weight_map = {
                name: file for file, shard in zip(files, shards, strict=True) for name in shard
            }
            size = sum(2 * math.prod(shape) for _, shape in tensors.values())
            index = {
                "metadata": {"total_size": size},
                "weight_map": dict(sorted(weight_map.items())),
            }
            _write_json(folder / f"{stem}.safetensors.index.json", index)
        for file, shard in zip(files, shards, strict=True):
            self.file(folder / file, shard)
        _write_json(folder / "config.json", config)

    def file(self, path: Path, tensors, dtype: str = "BF16") -> None:
        """Write one file of random tensors."""
        table = ndtri((np.arange(_STEPS) + 0.5) / _STEPS)
        shapes = {name: shape for name, (_, shape) in tensors.items()}
        total = sum(np.dtype(_DTYPES[dtype]).itemsize * math.prod(x) for x in shapes.values())
        bar = {"total": total, "unit": "B", "unit_scale": True, "disable": not self.progress}
        with tqdm(desc=path.name, **bar) as shown:

            def make(name: str) -> np.ndarray:
                value = self._draw(name, *tensors[name], table, _DTYPES[dtype])
                shown.update(value.nbytes)
                return value

            write_safetensors(path, shapes, make, dtype)

    def _draw(self, name: str, leaf: str, shape: tuple[int, ...], table, dtype) -> np.ndarray:
        """Return a tensor that depends on its name and the seed, not on its place in a file."""
        if leaf == "scale":
            return np.ones(shape, dtype)
        deviation = math.prod(shape[1:]) ** -0.5 if leaf == "kernel" else 0.02
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return (deviation * table).astype(dtype)[rng.integers(0, _STEPS, shape, np.uint16)]


def _tensors(
    module: type[nnx.Module], config: Any, rules: list[Rule] | tuple[Rule, ...]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    return stored_tensors(lambda: module(config, rngs=TracingRngs()), rules)


def _split(tensors: dict, shard_bytes: int) -> list[dict]:
    """Fill shards in order, none above a size, as the libraries that publish do."""
    shards: list[dict] = [{}]
    filled = 0
    for name, (leaf, shape) in tensors.items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (leaf, shape)
        filled += size
    return shards


def _scheduler(sizes: ModelSizes) -> dict[str, Any]:
    return flux_scheduler(sizes.transformer.guidance_embeds)


def _check_tokenizers(source: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        read_json(source / name / "tokenizer_config.json")


def _copy_tokenizers(source: Path, folder: Path, sizes: ModelSizes) -> None:
    lengths = {"tokenizer": sizes.clip.max_position_embeddings, "tokenizer_2": 512}
    for name, length in lengths.items():
        shutil.copytree(source / name, folder / name)
        path = folder / name / "tokenizer_config.json"
        _write_json(path, read_json(path) | {"model_max_length": length})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
