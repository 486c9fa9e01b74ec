import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import CONFIG, INT8, MIXED, RECIPE, STEPPED, X, build, build_stepped, rule, samples
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh
from layers import EVERY_OP
from safetensors.numpy import save_file

from quartz_jax import Int, Quartz, Recipe, observe, place, quantize_model, sites
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.model import leaf_name, stored_arrays
from quartz_jax.io import files
from quartz_jax.transforms import Scale

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
QUANTIZED, REPORT = quantize_model(build(), RECIPE)


@pytest.fixture(scope="module")
def mixed():
    """A model with one layer of each op and several formats, and its report."""
    model = build_stepped()
    return quantize_model(model, MIXED, observe(model, samples(), MIXED.needs(sites(model))))


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
    given = {"model": QUANTIZED, "recipe": RECIPE, "report": REPORT, "base": base}
    checkpoint.save(folder, **given | options)
    return Path(folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What was checked in one test is not known to the next, nor to the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def saved(tmp_path, base):
    return save(tmp_path / "out", base)


def bits(model):
    """Return a model's arrays by path, those of 16-bit floats as integers."""
    state = nnx.to_pure_dict(nnx.state(model))
    return {
        leaf_name(path): np.asarray(x.view(jnp.uint16) if x.dtype == jnp.bfloat16 else x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


def assert_same_bits(model, expected):
    found = bits(model)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def hash_of(value):
    """Return the hash that quartz.json holds of what else it holds."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def edit(folder, *, sealed=True, **fields):
    """Change fields of quartz.json, and its hash with them if it's to be sealed."""
    path = folder / "quartz.json"
    value = json.loads(path.read_text()) | fields
    if sealed:
        del value["sha256"]
        value["sha256"] = hash_of(value)
    path.write_text(json.dumps(value))


def edit_transformer(folder, *, sealed=True, **fields):
    components = json.loads((folder / "quartz.json").read_text())["components"]
    edit(folder, sealed=sealed, components={"transformer": components["transformer"] | fields})


def test_loading_gives_back_every_array(saved):
    model, _ = checkpoint.load(saved, build=lambda config: build(config))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(QUANTIZED))
    np.testing.assert_array_equal(model(X), QUANTIZED(X))


def test_every_op_and_format_comes_back_bit_for_bit(tmp_path, base, mixed):
    model, report = mixed
    folder = save(tmp_path / "mixed", base, model=model, recipe=MIXED, report=report)
    loaded, _ = checkpoint.load(folder, lambda _: build_stepped())
    assert len(loaded.layers[0].up.ops.get_value()) == len(EVERY_OP)
    assert nnx.graphdef(loaded) == nnx.graphdef(model)  # what it does with them
    assert_same_bits(loaded, bits(model))


def test_groups_that_keep_eight_bits_come_back(tmp_path, base):
    layer = rule(r"layers\.\d\.down", Int(width=4), Quartz(), wide=0.25)
    recipe = Recipe(name="wide", rules=(layer,))
    model = build_stepped()
    seen = observe(model, samples(), recipe.needs(sites(model)))
    model, report = quantize_model(model, recipe, seen)
    folder = save(tmp_path / "wide", base, model=model, recipe=recipe, report=report)
    loaded, manifest = checkpoint.load(folder, lambda _: build_stepped())
    assert manifest.components["transformer"].recipe == recipe
    (op,) = loaded.layers[0].down.ops.get_value()
    assert op.groups.dtype == bool
    assert int(op.groups.sum()) == max(round(op.groups.size / 4), 1)
    assert_same_bits(loaded, bits(model))
    np.testing.assert_array_equal(place(loaded)[0](X), model(X))


class Buffers(nnx.Module):
    """A linear, and arrays that are no weights."""

    def __init__(self):
        self.a = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.ids = nnx.BatchStat(jnp.array([3003, 70001]))
        self.table = nnx.Param(jnp.array([3003]))
        self.factor = nnx.BatchStat(jnp.float32([1.0001]))


def test_defect_2_a_checkpoint_keeps_integers_and_float32_of_buffers_and_ops(tmp_path, base):
    """All was stored in bfloat16: 3003 came back as 3008, factors of 1.0001 as 1."""
    layer = rule("a", INT8, INT8, transforms=EVERY_OP[:2])
    recipe = Recipe(name="buffers", rules=(layer,))
    rows = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    seen = observe(Buffers(), [{"x": rows}], call=lambda model, x: model.a(x))
    seen = {"a": dataclasses.replace(seen["a"], mean=jnp.mean(rows, axis=0))}
    model, report = quantize_model(Buffers(), recipe, seen)
    folder = save(tmp_path / "out", base, model=model, recipe=recipe, report=report)
    loaded, _ = checkpoint.load(folder, lambda _: Buffers())
    np.testing.assert_array_equal(loaded.ids.get_value(), [3003, 70001])
    np.testing.assert_array_equal(loaded.table.get_value(), [3003])
    assert loaded.factor.get_value() == jnp.float32(1.0001)
    ops = loaded.a.ops.get_value()
    assert {x.dtype for x in jax.tree.leaves(ops)} == {jnp.dtype(jnp.float32)}
    (factor,) = (op.factor for op in ops if isinstance(op, Scale))
    assert (factor != factor.astype(jnp.bfloat16).astype(jnp.float32)).any()  # so that it matters
    assert_same_bits(loaded, bits(model))


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


def test_a_component_of_another_name_is_saved_and_loaded(tmp_path, base):
    (base / "transformer").rename(base / "unet")
    index = {"_class_name": "X", "unet": ["lib", "U"], "vae": ["lib", "V"]}
    (base / "model_index.json").write_text(json.dumps(index))
    folder = save(tmp_path / "out", base, component="unet")
    manifest = checkpoint.read_manifest(folder)
    assert (manifest.main, manifest.recipe) == ("unet", RECIPE)
    model, _ = checkpoint.load(folder, build=lambda config: build(config), component="unet")
    np.testing.assert_array_equal(model(X), QUANTIZED(X))
    assert (folder / "vae").is_dir() and not (folder / "transformer").exists()


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
    with pytest.raises(ValueError, match=r"format_version is 4, .*install a newer one"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize(
    "fields", [{"format_version": "1"}, {"format_version": 0}, {"components": {}}, {"more": 3}]
)
def test_malformed_fields_are_refused(saved, fields):
    edit(saved, **fields)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.load(saved, build)


@pytest.mark.parametrize("fields", [{"recipe": {}}, {"report": 3}, {"more": 3}, {"parts": {}}])
def test_malformed_fields_of_a_component_are_refused(saved, fields):
    edit_transformer(saved, **fields)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.load(saved, build)


def test_a_changed_manifest_is_refused_by_its_hash(saved):
    """Of the same shapes, so that nothing else would notice."""
    other = dataclasses.replace(RECIPE.rules[0].layer, activation=INT8)
    swapped = [dataclasses.replace(RECIPE.rules[0], layer=other), *RECIPE.rules[1:]]
    recipe = Recipe(name=RECIPE.name, rules=tuple(swapped)).to_json()
    original = (saved / "quartz.json").read_text()
    for change in (
        lambda: edit_transformer(saved, sealed=False, recipe=recipe),
        lambda: edit_transformer(saved, sealed=False, config=CONFIG | {"epsilon": 1}),
        lambda: edit(saved, sealed=False, carried={}),
        lambda: edit(saved, sealed=False, sha256=""),
    ):
        change()
        with pytest.raises(ValueError, match=r"quartz\.json can't be used: it was changed since"):
            checkpoint.load(saved, build)
        (saved / "quartz.json").write_text(original)
    edit(saved)  # laid out otherwise, and the same in what it says
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
    model, manifest = checkpoint.load(GOLDEN / "checkpoint_v1", build)
    digest = hashlib.sha256()
    for name, array in sorted(stored_arrays(nnx.state(model)).items()):
        digest.update(name.encode() + np.asarray(array).tobytes())
    assert digest.hexdigest() == "07ff5c55dc137616ba67a8981ba106c82f7f501e54c0e95597b42e7d610eab13"
    assert (manifest.format_version, manifest.recipe) == (1, RECIPE)


def test_version_2_loads():
    """Written by the code of version 2, with its arrays then; 4-bit integers had other names."""
    model, manifest = checkpoint.load(GOLDEN / "checkpoint_v2", build)
    now = {"values": "codes", "scale": "scales.scale"}
    expected = {}
    for name, array in np.load(GOLDEN / "checkpoint_v2_arrays.npz").items():
        path, _, leaf = name.rpartition(".")
        expected[f"{path}.{now[leaf]}" if path == "blocks.1.up.weight" else name] = array
    assert_same_bits(model, expected)
    assert manifest.format_version == 2
    assert manifest.recipe.rules[2] == rule(r"blocks\.1\.up", Int(width=4), Int(width=4))


def test_version_3_loads():
    """Written by a calibrated conversion when version 3 was made, with its arrays then."""
    model, manifest = checkpoint.load(GOLDEN / "checkpoint_v3", build_stepped)
    assert_same_bits(model, np.load(GOLDEN / "checkpoint_v3_arrays.npz"))
    checkpoint.check_carried(GOLDEN / "checkpoint_v3", manifest)
    component = manifest.components["transformer"]
    assert (manifest.format_version, component.recipe, component.config) == (3, MIXED, STEPPED)
    assert component.calibration == checkpoint.CalibrationRecord(
        prompts_sha256="0" * 64, samples=4, steps=(0, 2), seed=0, propagate=True, size=(32, 32)
    )
    assert [layer.path for layer in component.report.layers] == [
        "embed",
        *(f"layers.{i}.{name}" for i in range(3) for name in ("down", "up")),
    ]


def test_version_1_with_a_missing_field_is_refused(tmp_path):
    value = json.loads((GOLDEN / "checkpoint_v1" / "quartz.json").read_text())
    del value["recipe"]
    (tmp_path / "quartz.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="missing or unknown fields: recipe"):
        checkpoint.read_manifest(tmp_path)


def test_the_description_says_what_it_is(saved):
    text = checkpoint.describe(saved, layers=True)
    for part in (
        "quantized from base",
        "format version 3",
        "recipe test",
        checkpoint.read_manifest(saved).components["transformer"].base_sha256,
        "2 layers with quartz g16 weights and quartz g16 inputs",
        "blocks.1.down",
        "vae: 3 bytes, as it was",
    ):
        assert part in text


def on_h100():
    """Tracing for a GPU that isn't there."""
    chip = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=1, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=chip))


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("weight", [Quartz(), Int(width=4)])
def test_defect_5_a_placed_model_is_not_saved(tmp_path, base, weight, on_gpu):
    """A folder was written that could never be loaded: "missing a.weight.codes"."""
    recipe = Recipe(name="one", rules=(rule("a", weight, INT8),))
    linear = nnx.Linear(128, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model, report = quantize_model(nnx.Dict({"a": linear}), recipe)
    given = {"recipe": recipe, "report": report}

    def check(model):
        with pytest.raises(ValueError, match=r"a isn't stored as recipe 'one' has it: .* placed"):
            save(tmp_path / "out", base, model=place(model)[0], **given)
        return jnp.zeros(())

    if on_gpu:
        with on_h100():
            nnx.eval_shape(check, model)
    elif isinstance(weight, Int):  # is brought to another form though no kernel reads it
        check(model)
    else:
        save(tmp_path / "placed", base, model=place(model)[0], **given)
        loaded, _ = checkpoint.load(tmp_path / "placed", lambda _: nnx.Dict({"a": linear}))
        assert_same_bits(loaded, bits(model))
    assert not (tmp_path / "out").exists()
    save(tmp_path / "out", base, model=model, **given)


def test_a_model_is_not_saved_with_the_recipe_of_another(tmp_path, base, mixed):
    for recipe in (
        Recipe(name="none", rules=()),
        Recipe(name="int8", rules=(rule(".*", INT8, INT8),)),
    ):
        with pytest.raises(ValueError, match=f"isn't stored as recipe '{recipe.name}' has it"):
            save(tmp_path / "out", base, model=mixed[0], recipe=recipe, report=mixed[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["[v1]", "FLUX [dev] {x} a*b?"])
def test_what_is_written_below_brackets_is_read_there_and_elsewhere(tmp_path, base, name):
    (tmp_path / name).mkdir()
    folder = save(tmp_path / name / name, base)
    assert_same_bits(checkpoint.load(folder, build)[0], bits(QUANTIZED))
    folder = shutil.copytree(folder, tmp_path / "plain")
    assert_same_bits(checkpoint.load(folder, build)[0], bits(QUANTIZED))


SYSTEM_FILES = (".DS_Store", "Thumbs.db", "._manifest.ocdbt", "desktop.ini")


@pytest.mark.parametrize("name", SYSTEM_FILES)
def test_files_of_operating_systems_do_not_make_a_checkpoint_corrupt(saved, name):
    for folder in (saved, saved / "vae", saved / "transformer", saved / "transformer" / "other"):
        (folder / name).write_bytes(bytes(100))
    model, manifest = checkpoint.load(saved, build)
    checkpoint.check_carried(saved, manifest)
    assert_same_bits(model, bits(QUANTIZED))


def test_files_of_operating_systems_in_the_base_may_go_again(tmp_path, base):
    for name in ("._LICENSE.md", "vae/.DS_Store"):
        (base / name).write_bytes(bytes(100))
    folder = save(tmp_path / "out", base)
    for name in ("._LICENSE.md", "vae/.DS_Store"):
        (folder / name).unlink(missing_ok=True)
    checkpoint.check_carried(folder, checkpoint.read_manifest(folder))


@pytest.mark.parametrize("name", ["vae/weights.bin", "LICENSE.md", "model_index.json"])
def test_a_flipped_bit_in_what_is_carried_is_noticed(saved, name):
    manifest = checkpoint.read_manifest(saved)
    checkpoint.check_carried(saved, manifest)
    contents = bytearray((saved / name).read_bytes())
    contents[1] ^= 4
    (saved / name).write_bytes(contents)
    with pytest.raises(ValueError, match=f"{name.partition('/')[0]} is corrupt or was replaced"):
        checkpoint.check_carried(saved, manifest)
    (saved / name).unlink()
    with pytest.raises(ValueError, match=r"corrupt or was replaced|is missing; .* is incomplete"):
        checkpoint.check_carried(saved, manifest)


def test_what_was_checked_and_stays_unchanged_is_not_read_again(saved, monkeypatch):
    manifest, read, real = checkpoint.read_manifest(saved), [], files.hash_file
    monkeypatch.setattr(files, "hash_file", lambda file: read.append(file.name) or real(file))
    checkpoint.check_carried(saved, manifest)
    assert sorted(read) == ["LICENSE.md", "model_index.json", "weights.bin"]
    read.clear()
    checkpoint.check_carried(saved, manifest)
    assert read == []
    os.utime(saved / "vae" / "weights.bin", ns=(0, 0))
    checkpoint.check_carried(saved, manifest)
    assert read == ["weights.bin"]


@pytest.mark.parametrize("name", ["transformer/other/state/_METADATA", "LICENSE.md"])
def test_all_contents_are_checked(saved, name):
    checkpoint.check_contents(saved)
    (saved / name).write_bytes((saved / name).read_bytes() + b" ")
    with pytest.raises(ValueError, match="corrupt or"):
        checkpoint.check_contents(saved)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_checkpoints_of_every_version_are_what_was_written(version):
    checkpoint.check_contents(GOLDEN / f"checkpoint_v{version}")


@pytest.mark.parametrize(
    "fields",
    [
        {"carried": []},
        {"carried": {"vae": 3}},
        {"carried": {"../base": "0" * 64}},
        {"base_name": 3},
        {"library_version": None},
    ],
)
def test_odd_fields_that_are_sealed_are_refused(saved, fields):
    edit(saved, **fields)
    with pytest.raises(ValueError, match=r"quartz\.json can't be used"):
        checkpoint.read_manifest(saved)


@pytest.mark.parametrize("name", ["..", "../out/transformer", "/etc", "a\\b", "a\0b", ""])
def test_names_in_a_manifest_never_lead_out_of_its_folder(saved, name):
    value = json.loads((saved / "quartz.json").read_text())
    transformer = value["components"]["transformer"]
    changes = [{"components": {"transformer": transformer, name: transformer}}]
    if name:  # version 1 has one part, of no name
        parts = {name: transformer["parts"]["other"]}
        changes.append({"components": {"transformer": transformer | {"parts": parts}}})
    for change in changes:
        edit(saved, **value | change)
        with pytest.raises(ValueError, match="is no name of a file or folder in it"):
            checkpoint.read_manifest(saved)


@pytest.mark.parametrize(
    "name", ["scheduler/scheduler_config.json", "vae_2/config.json", "tokenizer/vocab.json"]
)
def test_parts_of_a_model_that_came_later_are_not_taken_for_the_checkpoint_s(saved, name):
    (saved / "notes").mkdir()  # no part of a model
    (saved / "notes" / "readme.txt").write_text("mine")
    checkpoint.check_contents(saved)
    (saved / name).parent.mkdir()
    (saved / name).write_text("{}")
    with pytest.raises(ValueError, match=r"isn't in quartz\.json, so it was put there later"):
        checkpoint.check_contents(saved)
