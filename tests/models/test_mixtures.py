"""What models state of attention: which rows are its values, and what reads the mixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module
from small_flux import SIZES, random_transformer
from transformer_cases import CASES

from models.checkpoint_io import TracingRngs
from models.image_encoders.siglip import SiglipVisionConfig, SiglipVisionEncoder
from models.text_encoders import CLIPTextEncoder, T5Encoder
from models.text_encoders.decoder import Decoder, DecoderConfig
from quartz_jax import Int, LayerRecipe, Match, Recipe, Rule, sites
from quartz_jax.recipes.sites import layers
from quartz_jax.transforms import BlockRotation, Folded, Rotate, Turned

INT8 = Int(width=8)
LAYER = LayerRecipe(weight=INT8, activation=INT8, transforms=(Rotate(block=4, fold=256),))
RECIPE = Recipe(name="folded", rules=(Rule(match=Match(), layer=LAYER),))
TOKENS = np.arange(10).reshape(2, 5) % 7


def built(case):
    config = case.component.config.from_json(case.config)
    return random_module(lambda: case.component.build(config, jnp.float32))


def flux_inputs():
    config, rng = SIZES["transformer"], np.random.default_rng(0)
    return {
        "hidden_states": rng.normal(size=(2, 6, config.in_channels)),
        "encoder_hidden_states": rng.normal(size=(2, 4, config.joint_attention_dim)),
        "pooled_projections": rng.normal(size=(2, config.pooled_projection_dim)),
        "timestep": np.array([0.9, 0.3]),
        "img_ids": rng.integers(0, 4, (6, 3)),
        "txt_ids": np.zeros((4, 3)),
        "guidance": np.array([3.5, 2.0]),
    }


def decoder():
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    return random_module(lambda: Decoder(config, rngs=TracingRngs()))


def siglip():
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    return random_module(lambda: SiglipVisionEncoder(config, rngs=TracingRngs()))


def t5():
    return random_module(lambda: T5Encoder(SIZES["text_encoder_2"], rngs=TracingRngs()))


def clip():
    config = SIZES["text_encoder"]
    return random_module(lambda: CLIPTextEncoder(config, rngs=TracingRngs()))


PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 28, 28, 3))
MODELS = {
    "FLUX.1": (random_transformer, flux_inputs),
    "T5": (t5, lambda: {"input_ids": TOKENS}),
    "decoder": (decoder, lambda: {"input_ids": TOKENS}),
    "SigLIP": (siglip, lambda: {"pixels": PIXELS}),
} | {
    name: (lambda case=case: built(case), lambda case=case: case.arguments((4, 4)))
    for name, case in CASES.items()
}


def rotated(model, only=None):
    """Return a copy with the rows of values rotated and what reads the mixtures, as they are."""
    assigned = RECIPE.assign([site for site in sites(model) if site.obstacle is None])
    model, found = nnx.clone(model), []
    for path, linear in layers(model):
        for step in assigned[path].transforms if path in assigned else ():
            kernel = linear.kernel.get_value()
            if isinstance(step, Folded) and only is not Turned:
                op = BlockRotation(size=step.size, first=step.first, folded=step.folded)
                linear.kernel.set_value(op.given(kernel.T).T)
                found.append(path)
            if isinstance(step, Turned) and only is not Folded:
                linear.kernel.set_value(step.op.turned(kernel))
                if linear.bias is not None:
                    linear.bias.set_value(step.op.turned(linear.bias.get_value()))
    return model, found


@pytest.fixture(scope="module", params=MODELS)
def model_and_call(request):
    build, inputs = MODELS[request.param]
    arguments = jax.tree.map(jnp.asarray, inputs())
    graph, state = nnx.split(build())

    @jax.jit
    def run(state):
        return jax.tree.leaves(nnx.merge(graph, state)(**arguments))[-1]

    return nnx.merge(graph, state), lambda model: np.asarray(run(nnx.state(model)), np.float64)


def test_rotating_values_and_what_reads_them_changes_nothing(model_and_call):
    model, call = model_and_call
    wanted = call(model)
    both, found = rotated(model)
    readers = {s.path for s in sites(model) if s.role in ("attention_out", "mixed_out")}
    assert set(found) == readers and readers
    size = np.linalg.norm(wanted)
    assert np.linalg.norm(call(both) - wanted) < 1e-5 * size  # float32's rounding, through blocks
    for side in (Folded, Turned):
        assert np.linalg.norm(call(rotated(model, side)[0]) - wanted) > 1e-3 * size


def test_a_family_states_the_values_of_each_attention():
    """Those whose heads no matrix is for rotate online: CLIP's here are of ten channels."""
    model = nnx.eval_shape(clip)
    assert all(site.mixture for site in sites(model) if site.role == "attention_out")
    reasons = RECIPE.online(sites(model))
    assert set(reasons.values()) == {"4 doesn't divide 10 channels"}
    assert len(reasons) == SIZES["text_encoder"].num_hidden_layers
