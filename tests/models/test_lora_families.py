"""Adapters of families after FLUX.1 against diffusers', in the namings that are in use."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_transformers import as_tensors, peer_of, relative_error
from transformer_cases import CASES, SIZES

from models.flux2.family import FLUX2
from models.lora import add_lora, read_lora
from models.zimage.family import ZIMAGE

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
from diffusers.loaders import lora_conversion_utils as convert  # noqa: E402 (needs torch)

FAMILIES = {"FLUX.2 klein": FLUX2, "Z-Image": ZIMAGE}
BLOCKS = ("double_blocks", "single_blocks", "layers", "noise_refiner", "context_refiner")


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def models(name, tmp_path_factory):
    """Return ours, and diffusers'."""
    case, folder = CASES[name], tmp_path_factory.mktemp("model")
    peer = peer_of(case)
    peer.save_pretrained(folder)
    return case.component.load(folder, jnp.float32), peer


def factors_of(model, naming, prefix, *, blocks_only):
    """Return random factors for every linear, under the naming's names."""
    rng = np.random.default_rng(0)
    component = next(c.component for c in CASES.values() if type(model) is c.component.module)
    tensors = component.tensors(model.config, naming)
    found = {}
    for tensor, (leaf, shape) in tensors.items():
        module = tensor.removesuffix(".weight")
        if leaf != "kernel" or (blocks_only and not module.startswith(BLOCKS)):
            continue
        for part, size in (("A", (2, shape[1])), ("B", (shape[0], 2))):
            values = 0.3 * rng.normal(size=size).astype(np.float32)
            found[f"{prefix}{module}.lora_{part}.weight"] = values
    return found


def originals(name, ours, component):
    """Return factors in the naming of programs other than diffusers, and its function for them."""
    if name == "Z-Image":  # diffusers' names behind another prefix
        factors = factors_of(ours, component.folder, "diffusion_model.", blocks_only=True)
        return factors, convert._convert_non_diffusers_z_image_lora_to_diffusers
    factors = factors_of(ours, component.file, "diffusion_model.", blocks_only=True)
    return factors, convert._convert_non_diffusers_flux2_lora_to_diffusers


@pytest.mark.parametrize("naming", ["diffusers", "original"])
def test_an_adapted_output_is_diffusers(name, models, naming, tmp_path):
    (ours, peer), case = models, CASES[name]
    if naming == "diffusers":
        factors = factors_of(ours, case.component.folder, "transformer.", blocks_only=False)
        theirs = as_tensors(factors)
    else:
        factors, converted = originals(name, ours, case.component)
        theirs = converted(as_tensors(factors))
        theirs = {f"transformer.{key.removeprefix('transformer.')}": x for key, x in theirs.items()}
    save_file(factors, tmp_path / "a.safetensors")
    adapter = read_lora(tmp_path / "a.safetensors", FAMILIES[name], ours.config)
    adapted = add_lora(ours, [adapter], dtype=jnp.float32)
    arguments = case.arguments(SIZES[0])
    peer.load_lora_adapter(theirs, prefix="transformer")
    try:
        with torch.no_grad():
            sample = peer(**as_tensors(arguments)).sample
    finally:
        peer.unload_lora()
    expected = torch.stack(sample) if isinstance(sample, list) else sample
    call = nnx.jit(lambda model, arguments: model(**arguments))
    assert relative_error(call(ours, arguments), expected) > 1e-2  # the adapter does something
    assert relative_error(call(adapted, arguments), expected) <= 1e-4
