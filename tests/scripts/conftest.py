import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Files of models are made by their own tests' modules.
sys.path[:0] = [str(ROOT / x) for x in ("scripts", "tests/models", "tests/quartz_jax")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a tiny random FLUX model."""
    pytest.importorskip("torch")
    from tiny_pipeline import make_tiny_flux

    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_flux(folder, dev=True)
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Folder of a small random FLUX model, its weights in several shards; needs no torch."""
    from small_flux import SIZES

    from models import component, synthetic
    from models.flux.family import FLUX
    from models.tiny_flux.architecture import FOLDER

    folder = tmp_path_factory.mktemp("models") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "_SHARD_BYTES", {"diffusers": 200_000, "transformers": 100_000})
        synthetic.write_random_model(folder, FLUX, SIZES, tokenizers=FOLDER)
    return folder


@pytest.fixture(scope="session")
def single_files(small, tmp_path_factory):
    """The same transformer and autoencoder in Black Forest Labs' naming."""
    import jax.numpy as jnp
    from small_flux import save_bfl_transformer, save_bfl_vae

    import models

    folder = tmp_path_factory.mktemp("models")
    names = {"transformer": "flux1-dev.safetensors", "vae": "ae.safetensors"}
    save = {"transformer": save_bfl_transformer, "vae": save_bfl_vae}
    for name, file in names.items():
        save[name](models.load_component(small / name, dtype=jnp.bfloat16), folder / file)
    return folder


@pytest.fixture(scope="session")
def quantized(tiny, tmp_path_factory):
    """Folder of the tiny model quantized by the default recipe."""
    from quartz_jax.cli import quantize

    folder = tmp_path_factory.mktemp("quantized") / "w4a8x"
    quantize.main(["--model", str(tiny), "--out", str(folder)])
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory):
    """File of a random adapter for every linear of the tiny model's blocks, kohya's naming."""
    import lora_files

    from models.flux import FluxConfig

    config = FluxConfig(  # of the tiny model
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        axes_dims_rope=(4, 14, 14),
    )
    factors = lora_files.random_factors(lora_files.bfl_modules(config))
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    return lora_files.save(path, lora_files.kohya_tensors(factors, alpha=2.0))


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """File of a picture to start from, of another size than the images that are made."""
    import numpy as np
    from PIL import Image

    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run_script():
    """Run a script as a command; gives the finished process."""

    def run(name, *argv, **env):
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, argv)]
        env = os.environ | {"PYTHONPATH": str(ROOT)} | env  # works without an installation too
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        # CUDA's plugin, there for the compile-only tests, says on stderr that it finds no GPU.
        noise = ("absl::InitializeLog()", "Could not find cuda drivers")
        lines = [x for x in done.stderr.splitlines() if not any(part in x for part in noise)]
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout, "\n".join(lines)
        )

    return run
