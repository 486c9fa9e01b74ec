import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CONFIG, RECIPE, X, build
from flax import nnx
from safetensors.numpy import save_file

from quartz_jax import quantize_model
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.model import stored_arrays

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoint_v1"
QUANTIZED, REPORT = quantize_model(build(), RECIPE)


@pytest.fixture
def base(tmp_path):
    """A model folder with one more component, and files that should and shouldn't be copied."""
    folder = tmp_path / "base"
    for name in ("transformer", "vae", "unrelated"):
        (folder / name).mkdir(parents=True)
    index = {"_class_name": "X", "transformer": ["lib", "T"], "vae": ["lib", "V"], "none": None}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    save_file({"x": np.zeros(3)}, folder / "transformer" / "model.safetensors")
    (folder / "vae" / "weights.bin").write_bytes(b"vae")
    (folder / "LICENSE.md").write_text("licence")
    (folder / "single_file.safetensors").write_bytes(b"large")
    return folder


def save(folder, base, **options):
    checkpoint.save(folder, QUANTIZED, recipe=RECIPE, report=REPORT, base=base, **options)
    return Path(folder)


@pytest.fixture
def saved(tmp_path, base):
    return save(tmp_path / "out", base)


def edit(folder, **fields):
    path = folder / "quartz.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_transformer(folder, **fields):
    components = json.loads((folder / "quartz.json").read_text())["components"]
    edit(folder, components={"transformer": components["transformer"] | fields})


def test_loading_gives_back_every_array(saved):
    model, _ = checkpoint.load(saved, build=lambda config: build(config))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(QUANTIZED))
    np.testing.assert_array_equal(model(X), QUANTIZED(X))


def test_loading_never_initialises_the_16_bit_model(saved):
    def traced_only(config):
        model = build(config)
        assert isinstance(model.embed.kernel.get_value(), jax.core.Tracer)
        return model

    checkpoint.load(saved, traced_only)


def test_loading_takes_the_dtype_of_the_model_that_is_built(saved):
    def in_bf16(config):
        model = build(config)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model)))
        return model

    model, _ = checkpoint.load(saved, in_bf16)
    assert model.embed.kernel.get_value().dtype == jnp.bfloat16
    assert model.blocks[0].up.weight.get_value().scale.dtype == jnp.float32


def test_the_manifest_comes_back(saved, base):
    _, manifest = checkpoint.load(saved, build)
    assert (manifest.recipe, manifest.report) == (RECIPE, REPORT)
    assert (manifest.base_name, manifest.components["transformer"].config) == (base.name, CONFIG)


def test_the_base_is_identified_by_its_contents(tmp_path, base):
    def base_hash(name):
        return checkpoint.read_manifest(save(tmp_path / name, base)).components["transformer"]

    first = base_hash("a").base_sha256
    save_file({"x": np.ones(3)}, base / "transformer" / "model.safetensors")
    assert base_hash("b").base_sha256 != first


def test_other_components_and_licences_are_copied_and_nothing_else(saved):
    assert (saved / "vae" / "weights.bin").read_bytes() == b"vae"
    names = {path.name for path in saved.iterdir()}
    assert names == {"quartz.json", "transformer", "vae", "model_index.json", "LICENSE.md"}


def test_what_is_stored_is_about_as_large_as_reported(saved):
    stored = sum(path.stat().st_size for path in (saved / "transformer").rglob("*"))
    assert stored < REPORT.bytes + 3 * 60_000  # Orbax's own files, in each part


def test_an_existing_folder_is_refused(saved, base):
    with pytest.raises(ValueError, match="out exists already"):
        save(saved, base)


def test_overwrite_replaces_an_existing_folder(saved, base):
    (saved / "stale").write_text("")
    save(saved, base, overwrite=True)
    assert not (saved / "stale").exists()
    assert checkpoint.read_manifest(saved).recipe == RECIPE


def test_overwrite_spares_what_is_no_checkpoint_and_what_holds_the_base(tmp_path, base):
    for folder, why in ((base, "holds files that"), (tmp_path, "which it is made from")):
        with pytest.raises(ValueError, match=why):
            save(folder, base, overwrite=True)
        (tmp_path / "quartz.json").touch()
    assert (base / "model_index.json").exists()


def test_an_interrupted_save_leaves_nothing(tmp_path, base, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ocp, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "out", base)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_interrupted_overwrite_keeps_the_old_checkpoint(saved, base, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.ocp, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(saved, base, overwrite=True)
    assert checkpoint.read_manifest(saved).recipe == RECIPE


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, base):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        save(tmp_path / "file" / "out", base)


def test_a_base_without_safetensors_is_refused(tmp_path, base):
    (base / "transformer" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no transformer/\*\.safetensors"):
        save(tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_a_newer_format_version_is_refused(saved):
    edit(saved, format_version=checkpoint.FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=r"format_version is 3, .*install a newer one"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize(
    "fields", [{"format_version": "1"}, {"format_version": 0}, {"components": {}}, {"more": 3}]
)
def test_malformed_fields_are_refused(saved, fields):
    edit(saved, **fields)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize("fields", [{"recipe": {}}, {"report": 3}, {"more": 3}])
def test_malformed_fields_of_a_component_are_refused(saved, fields):
    edit_transformer(saved, **fields)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "\x00"])
def test_a_corrupt_manifest_is_refused(saved, text):
    (saved / "quartz.json").write_text(text)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.load(saved, build)


def test_a_folder_that_is_no_checkpoint_is_refused(base):
    assert not checkpoint.is_checkpoint(base)
    with pytest.raises(ValueError, match="expected a quantized checkpoint"):
        checkpoint.load(base, build)


def test_missing_and_unexpected_tensors_are_named(saved):
    edit_transformer(saved, config=CONFIG | {"blocks": 3})
    with pytest.raises(ValueError, match=r"missing blocks\.2\.down\.weight\.scale"):
        checkpoint.load(saved, build)
    edit_transformer(saved, config=CONFIG | {"blocks": 1})
    with pytest.raises(ValueError, match=r"unexpected blocks\.1\.norm\.scale"):
        checkpoint.load(saved, build)


def test_misshapen_tensors_are_named(saved):
    edit_transformer(saved, config=CONFIG | {"hidden": 16})
    with pytest.raises(ValueError, match=r"misshapen embed\.bias: \[32\], expected \[16\]"):
        checkpoint.load(saved, build)


def test_one_wrong_bit_is_noticed(saved):
    files = [path for path in (saved / "transformer").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[-1] ^= 1
    largest.write_bytes(contents)
    with pytest.raises(ValueError, match="corrupt or incomplete"):
        checkpoint.load(saved, build)


def test_a_missing_file_is_noticed(saved):
    (saved / "transformer" / "blocks.1" / "state" / "_METADATA").unlink()
    with pytest.raises(ValueError, match="corrupt or incomplete"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json"])
def test_a_base_without_its_json_is_refused(tmp_path, base, name):
    (base / name).unlink()
    with pytest.raises(ValueError, match=f"no usable {name}"):
        save(tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_an_unknown_component_is_refused(saved):
    with pytest.raises(ValueError, match="has no quantized vae; it has transformer"):
        checkpoint.load(saved, build, "vae")


def test_version_1_loads():
    """Written by the code of version 1; the digest is that of its arrays then."""
    model, manifest = checkpoint.load(GOLDEN, build)
    digest = hashlib.sha256()
    for name, array in sorted(stored_arrays(nnx.state(model)).items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    assert digest.hexdigest() == "07ff5c55dc137616ba67a8981ba106c82f7f501e54c0e95597b42e7d610eab13"
    assert (manifest.format_version, manifest.recipe) == (1, RECIPE)


def test_version_1_with_a_missing_field_is_refused(tmp_path):
    value = json.loads((GOLDEN / "quartz.json").read_text())
    del value["recipe"]
    (tmp_path / "quartz.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="missing or unknown fields: recipe"):
        checkpoint.read_manifest(tmp_path)


def test_the_description_says_what_it_is(saved):
    text = checkpoint.describe(saved, layers=True)
    for part in (
        "quantized from base",
        "format version 2",
        "recipe test",
        checkpoint.read_manifest(saved).components["transformer"].base_sha256,
        "2 layers with quartz g16 weights and quartz g16 inputs",
        "blocks.1.down",
        "vae: 3 bytes, as it was",
    ):
        assert part in text
