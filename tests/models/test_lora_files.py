"""Where an adapter's scale may stand, what a file of one may hold, and what is refused."""

import json
import struct
import warnings

import jax.numpy as jnp
import lora_files
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from small_flux import SIZES

from models.flux import FluxTransformer
from models.flux.family import FLUX
from models.lora import add_lora, read_lora
from models.stored_files import CheckpointError

CONFIG = SIZES["transformer"]
HIDDEN = CONFIG.hidden_size
Q, K, DOWN = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "ff.net.2"
QKV = "double_blocks.0.img_attn.qkv"


def factors(*names, rank=4):
    modules = lora_files.diffusers_modules(CONFIG)
    return lora_files.random_factors({name: modules[name] for name in names}, rank)


def tensors(pairs, prefix="transformer."):
    named = {}
    for name, (down, up) in pairs.items():
        named |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
    return named


def delta(adapter, path=QKV):
    """Return what an adapter adds to a weight, [n, k]."""
    branch = adapter.branches[path]
    return (branch.down @ branch.up).T


def scale_of(adapter, pair, rows=slice(0, HIDDEN)):
    """Return the factor of up @ down that was taken."""
    down, up = pair
    found, plain = delta(adapter)[rows], up @ down
    scale = float((found * plain).sum() / (plain**2).sum())
    np.testing.assert_allclose(found, scale * plain, rtol=1e-4, atol=1e-5)
    return scale


def write_peft(folder, pairs, config, name="adapter_model.safetensors"):
    """Write a folder as PeftModel.save_pretrained does."""
    file = lora_files.save(folder / name, tensors(pairs, "base_model.model."))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    return file


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"r": 4, "lora_alpha": 32}, 8),
        ({"r": 4, "lora_alpha": 32, "use_rslora": True}, 16),
        ({"r": 4, "lora_alpha": 32, "alpha_pattern": {"to_q": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 32, "alpha_pattern": {r".*\.0\.attn\.to_q": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 32, "alpha_pattern": {"^to_q": 2, "o_q": 3, "to_k": 4}}, 8),
        ({"r": 16, "lora_alpha": 32, "rank_pattern": {"attn.to_q": 4}}, 8),
        ({"r": 4}, 2),  # PEFT's alpha is 8 if nothing is said
    ],
)
def test_the_scale_in_peft_s_config(tmp_path, config, wanted):
    pairs = factors(Q)
    file = write_peft(tmp_path, pairs, config)
    assert scale_of(read_lora(file, FLUX, CONFIG), pairs[Q]) == pytest.approx(wanted, rel=1e-5)
    moved = file.rename(tmp_path / "my_adapter.safetensors")  # its keys are PEFT's still
    assert scale_of(read_lora(moved, FLUX, CONFIG), pairs[Q]) == pytest.approx(wanted, rel=1e-5)


def test_deltas_are_those_of_peft_itself(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    sizes = {x: y for x, y in CONFIG.to_json().items() if x != "_class_name"}
    model = diffusers.FluxTransformer2DModel(**sizes)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"attn.to_k": 2},
        alpha_pattern={r"transformer_blocks\.\d+\.attn\.to_k": 5, "0.attn.to_v": 7},
        use_rslora=True,
        target_modules=["to_q", "to_k", "to_v"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path)
    adapter = read_lora(tmp_path / "adapter_model.safetensors", FLUX, CONFIG)
    for i in range(CONFIG.num_layers):
        attn = wrapped.base_model.model.transformer_blocks[i].attn
        with torch.no_grad():
            layers = (attn.to_q, attn.to_k, attn.to_v)
            wanted = torch.cat([layer.get_delta_weight("default") for layer in layers])
        found = delta(adapter, f"double_blocks.{i}.img_attn.qkv")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_the_scale_in_the_metadata_with_the_prefix_of_the_keys_or_none(tmp_path, prefix):
    pairs = factors(Q)
    config = {f"{prefix}r": 4, f"{prefix}lora_alpha": 32, "text_encoder.lora_alpha": 3}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    file = lora_files.save(tmp_path / "a.safetensors", tensors(pairs, prefix), metadata)
    assert scale_of(read_lora(file, FLUX, CONFIG), pairs[Q]) == pytest.approx(8, rel=1e-5)


def test_an_alpha_beside_the_factors_comes_first(tmp_path):
    pairs = factors(Q)
    alpha = {f"base_model.model.{Q}.alpha": np.float32(2)}
    lora_files.save(tmp_path / "a.safetensors", tensors(pairs, "base_model.model.") | alpha)
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 32}')
    adapter = read_lora(tmp_path / "a.safetensors", FLUX, CONFIG)
    assert scale_of(adapter, pairs[Q]) == pytest.approx(0.5, rel=1e-5)


def test_another_file_s_config_is_left_alone(tmp_path):
    pairs = factors(Q)
    write_peft(tmp_path, pairs, {"r": 4, "lora_alpha": 32})
    other = lora_files.save(tmp_path / "other.safetensors", tensors(pairs))
    assert scale_of(read_lora(other, FLUX, CONFIG), pairs[Q]) == pytest.approx(1, rel=1e-5)


def test_a_config_that_is_nowhere_is_missed_aloud(tmp_path):
    file = lora_files.save(tmp_path / "a.safetensors", tensors(factors(Q), "base_model.model."))
    with pytest.warns(UserWarning, match=r"adapter_config\.json.*taken as 1"):
        read_lora(file, FLUX, CONFIG)
    plain = lora_files.save(tmp_path / "b.safetensors", tensors(factors(Q)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_lora(plain, FLUX, CONFIG)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"r": 8, "lora_alpha": 8}, "has rank 4, and PEFT's config says 8"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 10**400}, "expected a finite number"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"alpha_pattern": {"to_q": "1"}}, r"alpha_pattern\['to_q'\] is '1'"),
        ({"alpha_pattern": {"([a-z_.0-9]+)+!": 1}}, "too intricate"),
        ({"alpha_pattern": {".*.*.*.*x": 1}}, "too intricate"),
        ({"rank_pattern": {"to_q": None}}, "rank_pattern"),
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the model's own weights"),
    ],
)
@pytest.mark.parametrize("place", ["beside", "metadata"])
def test_a_config_that_can_t_be_used_is_refused(tmp_path, config, told, place):
    if place == "beside":
        file = write_peft(tmp_path, factors(Q), config)
    else:
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        file = lora_files.save(tmp_path / "a.safetensors", tensors(factors(Q)), metadata)
    with pytest.raises(CheckpointError, match=told):
        read_lora(file, FLUX, CONFIG)


@pytest.mark.parametrize("text", ["[1]", '"x"', "null", "{", "[" * 10**5, "1" * 5000])
def test_metadata_that_is_no_object_is_refused(tmp_path, text):
    metadata = {"lora_adapter_metadata": text}
    file = lora_files.save(tmp_path / "a.safetensors", tensors(factors(Q)), metadata)
    with pytest.raises(CheckpointError, match="lora_adapter_metadata"):
        read_lora(file, FLUX, CONFIG)
    (tmp_path / "adapter_config.json").write_text(text)
    file = lora_files.save(tmp_path / "a.safetensors", tensors(factors(Q)))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_lora(file, FLUX, CONFIG)


@pytest.mark.parametrize("alpha", [{}, {f"transformer.{Q}.alpha": np.float32(4)}])
def test_a_module_of_rank_0_adds_nothing(tmp_path, alpha):
    pairs = {Q: (np.zeros((0, HIDDEN), np.float32), np.zeros((HIDDEN, 0), np.float32))}
    pairs |= factors(K)
    file = lora_files.save(tmp_path / "a.safetensors", tensors(pairs) | alpha)
    adapter = read_lora(file, FLUX, CONFIG)
    assert delta(adapter)[:HIDDEN].any() == np.False_
    assert scale_of(adapter, pairs[K], slice(HIDDEN, 2 * HIDDEN)) == pytest.approx(1)


def write_raw(path, stored):
    """Write (dtype, array) by name: safetensors' NumPy knows no float8."""
    header, blobs, end = {}, [], 0
    for name, (dtype, value) in stored.items():
        blob = value.tobytes()
        offsets, end = [end, end + len(blob)], end + len(blob)
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return path


def test_factors_in_float8(tmp_path):
    pairs = factors(Q)
    named = {x: y.astype(ml_dtypes.float8_e4m3fn) for x, y in tensors(pairs).items()}
    narrow = write_raw(tmp_path / "a", {x: ("F8_E4M3", y) for x, y in named.items()})
    save_file({x: y.astype(np.float32) for x, y in named.items()}, tmp_path / "b")
    found, wanted = (delta(read_lora(file, FLUX, CONFIG)) for file in (narrow, tmp_path / "b"))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("stored", "dtype"), [("I8", np.int8), ("BOOL", np.bool_)])
def test_factors_that_are_no_floats_are_refused(tmp_path, stored, dtype):
    named = {x: (stored, y.astype(dtype)) for x, y in tensors(factors(Q)).items()}
    file = write_raw(tmp_path / "a.safetensors", named)
    with pytest.raises(CheckpointError, match=f"to_q.lora_A.weight is stored as {stored}"):
        read_lora(file, FLUX, CONFIG)


@pytest.mark.parametrize(
    "other",
    [
        {f"transformer.{Q}.lora_down.weight": np.ones((4, HIDDEN), np.float32)},
        {f"transformer.{Q}.lora_A.default.weight": np.ones((4, HIDDEN), np.float32)},
        tensors(factors(Q), ""),
        tensors(factors(Q), "base_model.model."),
        lora_files.kohya_tensors(
            lora_files.random_factors({"double_blocks.0.img_attn.qkv": (HIDDEN, 3 * HIDDEN)})
        ),
    ],
)
def test_a_linear_that_is_given_twice_is_refused(tmp_path, other):
    file = lora_files.save(tmp_path / "a.safetensors", tensors(factors(Q)) | other)
    with pytest.raises(CheckpointError, match=r"same (factor|linear)"):
        read_lora(file, FLUX, CONFIG)


def test_keys_of_text_encoders_are_left_out_when_asked(tmp_path):
    pairs = factors(Q)
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": np.float32(1)}
    file = lora_files.save(tmp_path / "a.safetensors", tensors(pairs) | text)
    adapter = read_lora(file, FLUX, CONFIG, transformer_only=True)
    assert scale_of(adapter, pairs[Q]) == pytest.approx(1)
    file = lora_files.save(tmp_path / "b.safetensors", text)
    with pytest.raises(CheckpointError, match="no tensors for the transformer"):
        read_lora(file, FLUX, CONFIG, transformer_only=True)


@pytest.mark.parametrize("alpha", [3e38, float("inf"), float("nan")])
def test_an_alpha_that_makes_a_factor_infinite_is_refused(tmp_path, alpha):
    pair = np.ones((4, HIDDEN), np.float32), np.full((HIDDEN, 4), 8.0, np.float32)
    alphas = {f"transformer.{Q}.alpha": np.float32(alpha)}
    file = lora_files.save(tmp_path / "a.safetensors", tensors({Q: pair}) | alphas)
    with pytest.raises(CheckpointError, match="its alpha makes it infinite"):
        read_lora(file, FLUX, CONFIG)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, 3e38])
def test_a_scale_that_overflows_is_refused(tmp_path, scale):
    pair = np.full((4, HIDDEN), 2.0, np.float32), np.full((HIDDEN, 4), 2.0, np.float32)
    file = lora_files.save(tmp_path / "a.safetensors", tensors({Q: pair}))
    with pytest.raises(ValueError, match="scales holds"):
        model = nnx.eval_shape(lambda: FluxTransformer(CONFIG, rngs=nnx.Rngs(0)))
        add_lora(model, [read_lora(file, FLUX, CONFIG)], [scale], jnp.float32)
