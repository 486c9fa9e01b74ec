"""Files of the published protocol's networks, the libraries' own classes with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.tiny_flux.architecture import FOLDER


def save_inception(path: Path) -> Path:
    """Save torch-fidelity's Inception; its class makes none without a file, so this loads none."""
    import torch
    from torch_fidelity import FeatureExtractorInceptionV3

    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # so that features are as large as its input
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def save_alexnet(path: Path) -> Path:
    """Save the convolutions of torchvision's AlexNet under its names."""
    import torch
    import torchvision

    trunk = torchvision.models.alexnet(weights=None).features
    torch.save({f"features.{name}": x for name, x in trunk.state_dict().items()}, path)
    return path


def save_clip(folder: Path) -> Path:
    """Save a tiny CLIP with the embedded model's tokenizer."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    text = sizes | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(8)  # of one that scores the tests' images above zero
    CLIPModel(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_mjhq(folder: Path, prompts: list[str]) -> Path:
    """Save a list of prompts and their noise-like images as MJHQ-30K has them; gives the list."""
    rng, entries = np.random.default_rng(0), {}
    for i, prompt in enumerate(prompts):
        name, category = f"{i:03d}", ("animals", "food")[i % 2]
        entries[name] = {"category": category, "prompt": prompt}
        (folder / category).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / category / f"{name}.jpg")
    (folder / "meta_data.json").write_text(json.dumps(entries))
    return folder / "meta_data.json"
