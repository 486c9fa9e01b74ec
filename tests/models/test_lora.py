"""Adapters: parity with diffusers through PEFT, the namings, and what is refused."""

import json

import jax
import jax.numpy as jnp
import lora_files
import numpy as np
import pytest
from flax import nnx

import models
from models.flux import FluxConfig
from models.flux.family import FLUX
from models.linear import Linear, Part, modulation
from models.lora import LoRALinear, add_lora, read_lora
from models.stored_files import CheckpointError

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from tiny_pipeline import make_tiny_flux  # noqa: E402 (needs diffusers)

TINY = FluxConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    guidance_embeds=True,
    axes_dims_rope=(4, 14, 14),
)
ALPHA = 6.0  # not the rank of the random adapters, which is 4


@pytest.fixture(scope="module", params=[True, False], ids=["dev", "schnell"])
def tiny(request, tmp_path_factory):
    """Return diffusers' transformer pipeline and our transformer, the same weights."""
    folder = tmp_path_factory.mktemp("tiny")
    peer = make_tiny_flux(folder, dev=request.param)
    return peer, models.load_component(folder / "transformer", jnp.float32)


def inputs(config):
    """Return the arguments of one evaluation, batch 2, 2x3 image tokens, 5 text tokens."""
    random = np.random.default_rng(1)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
    arguments = {
        "hidden_states": normal(2, 6, config.in_channels),
        "encoder_hidden_states": normal(2, 5, config.joint_attention_dim),
        "pooled_projections": normal(2, config.pooled_projection_dim),
        "timestep": np.float32([0.9, 0.4]),
        "img_ids": np.float32([[0, row, column] for row in range(2) for column in range(3)]),
        "txt_ids": np.zeros((5, 3), np.float32),
    }
    return arguments | ({"guidance": np.float32([3.5, 3.5])} if config.guidance_embeds else {})


def evaluate_peer(peer):
    arguments = {k: torch.from_numpy(x) for k, x in inputs(peer.transformer.config).items()}
    with torch.no_grad():
        return peer.transformer(**arguments).sample.numpy()


def evaluate(transformer):
    return np.asarray(transformer(**inputs(transformer.config)))


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def run_both(tiny, files, scales):
    """Return our velocity and diffusers', with the same adapter files and scales."""
    peer, ours = tiny
    names = [f"adapter{i}" for i in range(len(files))]
    plain = evaluate_peer(peer)
    try:
        for name, file in zip(names, files, strict=True):
            peer.load_lora_weights(str(file), adapter_name=name)
        peer.set_adapters(names, adapter_weights=list(scales))
        expected = evaluate_peer(peer)
    finally:
        peer.unload_lora_weights()
    assert relative_error(expected, plain) > 0.05  # the adapter does something
    adapters = [read_lora(file, FLUX, ours.config) for file in files]
    return evaluate(add_lora(ours, adapters, scales, jnp.float32)), expected


def test_diffusers_adapter_matches_diffusers(tiny, tmp_path):
    factors = lora_files.random_factors(lora_files.diffusers_modules(tiny[1].config))
    file = lora_files.save(tmp_path / "a.safetensors", lora_files.diffusers_tensors(factors))
    found, expected = run_both(tiny, [file], [0.7])
    assert relative_error(found, expected) <= 1e-4


def test_alphas_of_a_diffusers_adapter_match_diffusers(tiny, tmp_path):
    factors = lora_files.random_factors(lora_files.diffusers_modules(tiny[1].config))
    alphas = dict.fromkeys(factors, ALPHA) | {"transformer_blocks.0.attn.to_q": 1.0}
    tensors = lora_files.diffusers_tensors(factors, alphas)
    file = lora_files.save(tmp_path / "a.safetensors", tensors)
    found, expected = run_both(tiny, [file], [1.0])
    assert relative_error(found, expected) <= 1e-4


def test_alpha_in_the_metadata_matches_diffusers(tiny, tmp_path):
    names = ["attn.to_q", "attn.to_k", "ff.net.2"]
    modules = lora_files.diffusers_modules(tiny[1].config)
    factors = lora_files.only(lora_files.random_factors(modules), names)
    config = {"r": 4, "lora_alpha": 10.0, "alpha_pattern": {"attn.to_k": 2.0}}
    config |= {"target_modules": names}
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    file = lora_files.save(
        tmp_path / "a.safetensors",
        lora_files.diffusers_tensors(factors),
        {"format": "pt", "lora_adapter_metadata": metadata},
    )
    found, expected = run_both(tiny, [file], [1.0])
    assert relative_error(found, expected) <= 1e-4


def test_kohya_adapter_matches_diffusers(tiny, tmp_path):
    # linear1 is left out: diffusers splits it at FLUX.1's width only, see the test at full width
    modules = lora_files.bfl_modules(tiny[1].config)
    factors = lora_files.random_factors(modules)
    factors = {name: pair for name, pair in factors.items() if not name.endswith("linear1")}
    tensors = lora_files.kohya_tensors(factors, ALPHA)
    file = lora_files.save(tmp_path / "a.safetensors", tensors)
    found, expected = run_both(tiny, [file], [0.7])
    assert relative_error(found, expected) <= 1e-4


def test_two_adapters_of_both_namings_and_other_ranks_match_diffusers(tiny, tmp_path):
    config = tiny[1].config
    one = lora_files.random_factors(lora_files.diffusers_modules(config), rank=2)
    modules = lora_files.bfl_modules(config)
    other = lora_files.only(lora_files.random_factors(modules, rank=5, seed=1), ["qkv", "mlp.0"])
    files = [
        lora_files.save(tmp_path / "a.safetensors", lora_files.diffusers_tensors(one)),
        lora_files.save(tmp_path / "b.safetensors", lora_files.kohya_tensors(other, ALPHA)),
    ]
    found, expected = run_both(tiny, files, [0.5, -1.5])
    assert relative_error(found, expected) <= 1e-4


def test_kohya_adapter_at_full_width_is_what_diffusers_converts_it_to(tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    config = FluxConfig(num_layers=1, num_single_layers=1)  # 3072 wide
    tensors = lora_files.kohya_tensors(
        lora_files.random_factors(lora_files.bfl_modules(config)), ALPHA
    )
    file = lora_files.save(tmp_path / "kohya.safetensors", tensors)
    peer = _convert_kohya_flux_lora_to_diffusers(
        {name: torch.from_numpy(np.asarray(x)) for name, x in tensors.items()}
    )
    converted = {name: x.numpy() for name, x in peer.items()}
    converted = lora_files.save(tmp_path / "converted.safetensors", converted)
    branches, expected = (read_lora(path, FLUX, config).branches for path in (file, converted))
    assert branches.keys() == expected.keys()
    assert "single_blocks.0.linear1" in branches
    for path, branch in branches.items():
        x = np.random.default_rng(2).normal(size=(3, branch.down.shape[0])).astype(np.float32)
        found, wanted = (x @ b.down @ b.up for b in (branch, expected[path]))
        assert relative_error(found, wanted) <= 1e-5, path


def test_the_final_layers_halves_are_swapped_between_the_namings(tmp_path):
    hidden = TINY.hidden_size
    factors = lora_files.random_factors({"norm_out.linear": (hidden, 2 * hidden)})
    scale_first = lora_files.diffusers_tensors(factors)
    down, up = factors["norm_out.linear"]
    shift_first = lora_files.kohya_tensors(
        {"final_layer.adaLN_modulation.1": (down, np.concatenate([up[hidden:], up[:hidden]]))}
    )
    one, other = (
        read_lora(lora_files.save(tmp_path / "x.safetensors", tensors), FLUX, TINY).branches
        for tensors in (scale_first, shift_first)
    )
    assert one.keys() == other.keys() == {"final_layer.modulation"}
    np.testing.assert_array_equal(
        one["final_layer.modulation"].up, other["final_layer.modulation"].up
    )


@pytest.mark.parametrize(
    ("kind", "prefix", "parts"),
    [
        ("diffusers", "transformer.{}", ("lora_A.weight", "lora_B.weight")),
        ("diffusers", "{}", ("lora_A.weight", "lora_B.weight")),
        ("diffusers", "{}", ("lora_A.default.weight", "lora_B.default.weight")),
        ("diffusers", "base_model.model.{}", ("lora_A.weight", "lora_B.weight")),
        ("diffusers", "transformer.{}", ("lora.down.weight", "lora.up.weight")),
        ("diffusers", "lora_transformer_{_}", ("lora_down.weight", "lora_up.weight")),
        ("bfl", "lora_unet_{_}", ("lora_down.weight", "lora_up.weight")),
        ("bfl", "diffusion_model.{}", ("lora_A.weight", "lora_B.weight")),
        ("bfl", "diffusion_model.{}", ("lora_down.weight", "lora_up.weight")),
        ("bfl", "base_model.model.{}", ("lora_A.weight", "lora_B.weight")),
    ],
)
def test_every_naming_reaches_every_linear_of_the_blocks(tmp_path, kind, prefix, parts):
    modules = {"diffusers": lora_files.diffusers_modules, "bfl": lora_files.bfl_modules}[kind]
    tensors = {}
    for name, pair in lora_files.random_factors(modules(TINY)).items():
        module = prefix.replace("{_}", name.replace(".", "_")).replace("{}", name)
        tensors |= {f"{module}.{part}": x for part, x in zip(parts, pair, strict=True)}
    branches = read_lora(lora_files.save(tmp_path / "x.safetensors", tensors), FLUX, TINY).branches
    build = nnx.eval_shape(lambda: models.flux.FluxTransformer(TINY, rngs=nnx.Rngs(0)))
    linears = {
        ".".join(map(str, path)): linear
        for path, linear in nnx.iter_modules(build)
        if isinstance(linear, nnx.Linear)
    }
    wanted = {path for path in linears if kind == "diffusers" or "blocks" in path}
    assert branches.keys() == wanted
    for path, branch in branches.items():
        linear = linears[path]
        assert (branch.down.shape[0], branch.up.shape[1]) == (
            linear.in_features,
            linear.out_features,
        )


def test_the_branch_comes_before_activation_gate_and_residual():
    random = np.random.default_rng(0)
    x, down, up = (random.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (8, 2), (2, 6)))
    base = Linear(8, 6, rngs=nnx.Rngs(0))
    merged = Linear(8, 6, rngs=nnx.Rngs(0))
    merged.kernel[...] = merged.kernel[...] + down @ up
    shift, scale = (random.normal(size=(2, 1, 8)).astype(np.float32) for _ in range(2))
    around = {
        "norm": modulation(shift, scale),
        "activation": "gelu",
        "gate": random.normal(size=(2, 1, 6)).astype(np.float32),
        "residual": random.normal(size=(2, 3, 6)).astype(np.float32),
    }
    branched = LoRALinear(base, jnp.asarray(down), jnp.asarray(up))
    for name in around:
        some = {name: around[name]}
        np.testing.assert_allclose(branched(x, **some), merged(x, **some), atol=1e-5)
    np.testing.assert_allclose(branched(x, **around), merged(x, **around), atol=1e-5)
    parts = (Part(array=x, start=1, size=5, activation="gelu"), Part(array=x, size=3))
    for some in ({}, around):
        np.testing.assert_allclose(branched(parts, **some), merged(parts, **some), atol=1e-5)


def test_the_given_transformer_is_untouched_and_its_weights_are_shared(tiny, tmp_path):
    ours = tiny[1]
    before = evaluate(ours)
    factors = lora_files.random_factors(lora_files.diffusers_modules(ours.config))
    file = lora_files.save(tmp_path / "a.safetensors", lora_files.diffusers_tensors(factors))
    adapted = add_lora(ours, [read_lora(file, FLUX, ours.config)], dtype=jnp.float32)
    np.testing.assert_array_equal(evaluate(ours), before)
    kept = adapted.single_blocks[0].linear1.base.kernel
    assert kept.get_value() is ours.single_blocks[0].linear1.kernel.get_value()


def test_branches_are_16_bit_by_default(tiny, tmp_path):
    factors = lora_files.random_factors(lora_files.diffusers_modules(tiny[1].config))
    file = lora_files.save(tmp_path / "a.safetensors", lora_files.diffusers_tensors(factors))
    adapted = add_lora(tiny[1], [read_lora(file, FLUX, tiny[1].config)])
    branch = adapted.single_blocks[0].linear1
    assert (branch.down.dtype, branch.up.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_a_bfloat16_adapter_is_read(tmp_path):
    factors = lora_files.random_factors({"proj_out": (64, 16)})
    tensors = lora_files.diffusers_tensors(factors)
    rounded = {name: x.astype(jnp.bfloat16) for name, x in tensors.items()}
    branch = read_lora(lora_files.save(tmp_path / "a.safetensors", rounded), FLUX, TINY).branches
    np.testing.assert_array_equal(
        branch["final_layer.linear"].down, factors["proj_out"][0].astype(jnp.bfloat16).T
    )


def refused(tmp_path, tensors, match):
    file = lora_files.save(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=match) as error:
        read_lora(file, FLUX, TINY)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.fixture
def factors():
    return lora_files.random_factors(lora_files.diffusers_modules(TINY))


def test_unknown_keys_are_listed(tmp_path, factors):
    tensors = lora_files.diffusers_tensors(factors)
    extra = {
        "transformer.transformer_blocks.7.attn.to_q.lora_A.weight": np.zeros((4, 64), np.float32),
        "transformer.proj_out.dora_scale": np.zeros(4, np.float32),
    }
    line = refused(tmp_path, tensors | extra, "unknown key")
    assert all(f"unknown key {name}" in line for name in extra)
    assert line.count("unknown key") == 2


def test_the_list_of_another_models_keys_is_cut(tmp_path):
    tensors = {f"lora_unet_down_blocks_{i}.lora_up.weight": np.zeros((4, 4)) for i in range(50)}
    assert refused(tmp_path, tensors, "unknown key").endswith("; and 30 more")


def test_a_wrong_rank_is_named(tmp_path, factors):
    down, up = factors["proj_out"]
    tensors = lora_files.diffusers_tensors(factors | {"proj_out": (down, up[:, :3])})
    refused(
        tmp_path,
        tensors,
        r"transformer\.proj_out: lora_up is \[16, 3\], expected \[16, 4\] \(rank 4",
    )


def test_a_wrong_width_is_named(tmp_path, factors):
    down, up = factors["x_embedder"]
    tensors = lora_files.diffusers_tensors(factors | {"x_embedder": (down[:, :5], up)})
    refused(tmp_path, tensors, r"x_embedder: lora_down is \[4, 5\], expected \[rank, 16\]")


def test_a_missing_factor_is_named(tmp_path, factors):
    tensors = lora_files.diffusers_tensors(factors)
    del tensors["transformer.proj_out.lora_B.weight"]
    refused(tmp_path, tensors, "transformer.proj_out lacks lora_up")


def test_a_lone_alpha_is_named(tmp_path):
    refused(tmp_path, {"lora_unet_img_in.alpha": np.float32(4)}, "img_in lacks lora_down")


def test_keys_of_text_encoders_are_refused(tmp_path, factors):
    tensors = lora_files.diffusers_tensors(factors)
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    refused(tmp_path, tensors | {name: np.zeros((4, 20), np.float32)}, f"1 keys such as {name}")


def test_an_infinite_factor_is_refused(tmp_path, factors):
    factors["proj_out"][1][0, 0] = np.inf
    refused(tmp_path, lora_files.diffusers_tensors(factors), "proj_out holds NaN or infinity")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"pickle")
    for path in (tmp_path / "x", tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="can't be read as safetensors") as error:
            read_lora(path, FLUX, TINY)
        assert len(str(error.value).splitlines()) == 1


def test_an_empty_file_is_refused(tmp_path):
    refused(tmp_path, {}, "holds no tensors")


def test_the_compiled_transformer_with_adapters_gives_the_same(tiny, tmp_path):
    factors = lora_files.random_factors(lora_files.diffusers_modules(tiny[1].config))
    file = lora_files.save(tmp_path / "a.safetensors", lora_files.diffusers_tensors(factors))
    adapted = add_lora(tiny[1], [read_lora(file, FLUX, tiny[1].config)], dtype=jnp.float32)
    graphdef, state = nnx.split(adapted)
    compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(**x))
    found = np.asarray(compiled(state, inputs(adapted.config)))
    assert relative_error(found, evaluate(adapted)) <= 1e-5
