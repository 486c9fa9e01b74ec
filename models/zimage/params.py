"""Names of a Z-Image transformer's tensors, diffusers' and those of single files."""

from collections.abc import Mapping
from pathlib import Path

from models.checkpoint_io import Rule, count_blocks
from models.component import Component, Naming
from models.stored_files import CheckpointError
from models.zimage.config import ZImageConfig
from models.zimage.modeling import ZImageTransformer

# A tensor of single files that every one has, and no other model's.
TELLING = "cap_pad_token"
_BLOCK = r"((?:noise_refiner|context_refiner|layers)\.\d+)\."


def _shared_rules(config: ZImageConfig) -> list[Rule]:
    """Return the rules that hold for both namings."""
    table = {
        r"t_embedder\.in_layer": "t_embedder.mlp.0",
        r"t_embedder\.out_layer": "t_embedder.mlp.2",
        r"cap_embedder\.norm": "cap_embedder.0",
        r"cap_embedder\.linear": "cap_embedder.1",
        _BLOCK + r"modulation": r"\1.adaLN_modulation.0",
        _BLOCK + r"feed_forward\.down": r"\1.feed_forward.w2",
    }
    up = Rule(
        pattern=_BLOCK + r"feed_forward\.up",
        sources=(r"\1.feed_forward.w1", r"\1.feed_forward.w3"),
        rows=(config.mlp_size,) * 2,
    )
    return [up, *(Rule(pattern=pattern, sources=source) for pattern, source in table.items())]


def diffusers_rules(config: ZImageConfig) -> list[Rule]:
    """Return the rules from our module paths to diffusers' names."""
    size = f"{config.patch_size}-1"
    table = {
        r"x_embedder": f"all_x_embedder.{size}",
        r"final_layer\.modulation": f"all_final_layer.{size}.adaLN_modulation.1",
        r"final_layer\.linear": f"all_final_layer.{size}.linear",
        _BLOCK + r"attention\.(q|k)_norm": r"\1.attention.norm_\2",
        _BLOCK + r"attention\.out": r"\1.attention.to_out.0",
    }
    qkv = Rule(
        pattern=_BLOCK + r"attention\.qkv",
        sources=tuple(rf"\1.attention.to_{name}" for name in "qkv"),
        rows=(config.dim,) * 3,
    )
    named = [Rule(pattern=pattern, sources=source) for pattern, source in table.items()]
    return [*_shared_rules(config), qkv, *named]


def file_rules(config: ZImageConfig) -> list[Rule]:
    """Return the rules to the names of single files, as published by Comfy-Org.

    As `convert_z_image_transformer_checkpoint_to_diffusers` of diffusers'
    `loaders/single_file_utils.py` reads them.
    """
    last = Rule(pattern=r"final_layer\.modulation", sources="final_layer.adaLN_modulation.1")
    return [*_shared_rules(config), last]


def config_from_file(shapes: Mapping[str, tuple[int, ...]], path: Path | str = "") -> ZImageConfig:
    """Return the sizes that a single file has; it brings no config.json.

    Args:
      shapes: its tensors'.
      path: of the file, for errors.

    Raises:
      CheckpointError: a tensor that tells a size is missing, or the head has an unusual width.
    """
    telling = {
        "x_embedder.weight": 2,
        "cap_embedder.1.weight": 2,
        "layers.0.attention.q_norm.weight": 1,
    }
    if missing := [name for name in telling if name not in shapes]:
        raise CheckpointError(
            f"{path}: no Z-Image transformer: missing {'; missing '.join(missing)}"
        )
    image, text, head = found = [shapes[name] for name in telling]
    if [len(shape) for shape in found] != list(telling.values()) or 0 in (*image, *head):
        listed = ", ".join(f"{name} {list(shapes[name])}" for name in telling)
        raise CheckpointError(f"{path}: no Z-Image transformer: misshapen {listed}")
    if head[0] % 16:
        raise CheckpointError(
            f"{path}: heads of {head[0]} channels: how positions turn them is known for multiples "
            "of 16 only; convert to a diffusers folder, whose config.json says it"
        )
    return ZImageConfig(
        in_channels=image[1] // 4,  # tokens of 2 by 2 pixels
        dim=image[0],
        n_layers=count_blocks("layers", shapes),
        n_refiner_layers=count_blocks("noise_refiner", shapes),
        n_heads=image[0] // head[0],
        n_kv_heads=image[0] // head[0],
        cap_feat_dim=text[1],
        # 32, 48 and 48 of Z-Image's 128 channels
        axes_dims=(head[0] // 4, 3 * head[0] // 8, 3 * head[0] // 8),
    )


TRANSFORMER = Component(
    name="Z-Image transformer",
    classes=("ZImageTransformer2DModel",),
    library="diffusers",
    config=ZImageConfig,
    module=ZImageTransformer,
    folder=Naming(telling=TELLING, rules=lambda config, names: diffusers_rules(config)),
    file=Naming(
        telling=TELLING,
        rules=lambda config, names: file_rules(config),
        # of some files, and read by no program
        ignore=(r"norm_final\.weight",),
        config=config_from_file,
    ),
)
