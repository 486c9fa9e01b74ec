"""Streaming conversion: the arrays of the one in memory, from any interruption."""

import dataclasses
import functools
import json
import os
import resource
import shutil
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from blocks import CONFIG, INT8, RECIPE, build, poison, rule
from flax import nnx
from safetensors.numpy import save_file

from quartz_jax import Recipe, quantize_model
from quartz_jax.cli import arguments as cli
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion import stream as conversion
from quartz_jax.conversion.model import part_of, quantize_layer, stored_arrays
from quartz_jax.conversion.stream import Carried, Conversion, Source
from quartz_jax.io import files

PARTS = ["blocks.0", "blocks.1", "other"]


class Interrupted(BaseException):
    """Like a kill: nothing catches it."""


@pytest.fixture
def base(tmp_path):
    """Files of a model: only hashed and copied here."""
    folder = tmp_path / "base"
    (folder / "vae").mkdir(parents=True)
    save_file({"x": np.zeros(3)}, folder / "model.safetensors")
    (folder / "vae" / "weights.bin").write_bytes(b"vae")
    return folder


def convert(base, model=None, recipe=RECIPE, read=None):
    model = model or build()
    params = {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    source = Source(
        name="transformer",
        recipe=recipe,
        model=nnx.eval_shape(build),
        read=read or params.__getitem__,
        config=CONFIG,
        files=(base / "model.safetensors",),
    )
    carried = (Carried.copy(base / "vae"),)
    return Conversion(base_name="base", sources=(source,), carried=carried)


def arrays(folder):
    model, _ = checkpoint.load(folder, lambda config: build(config))
    return {name: np.asarray(x) for name, x in stored_arrays(nnx.state(model)).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def interrupt_at(monkeypatch, function, call):
    """Make `conversion`'s call number `call` of a function do half its work and stop."""
    module, name = function
    real, calls = getattr(module, name), []

    def stop(folder, *args):
        calls.append(folder)
        if len(calls) > call:
            folder.mkdir(parents=True)
            (folder / "half").write_text("written")
            raise Interrupted
        return real(folder, *args)

    monkeypatch.setattr(module, name, stop)


def test_the_arrays_and_the_report_are_those_of_quantize_model(tmp_path, base):
    manifest = convert(base).run(tmp_path / "out")
    model, report = quantize_model(build(), RECIPE)
    assert_equal(arrays(tmp_path / "out"), stored_arrays(nnx.state(model)))
    assert manifest.report == report


def test_a_model_without_quantized_layers_is_stored_in_bf16(tmp_path, base):
    convert(base, recipe=Recipe(name="bf16", rules=())).run(tmp_path / "out")
    assert {str(x.dtype) for x in arrays(tmp_path / "out").values()} == {"bfloat16"}


@pytest.mark.parametrize("finished", range(len(PARTS)))
def test_after_an_interruption_the_rest_is_done_and_the_result_is_the_same(
    tmp_path, base, monkeypatch, finished
):
    out = tmp_path / "out"
    convert(base).run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), finished)
        convert(base).run(out)
    assert not out.exists()

    params = {".".join(map(str, k)): x for k, x in nnx.to_flat_state(nnx.state(build()))}
    read = []

    def reading(path):
        read.append(path)
        return np.asarray(params[path][...])

    manifest = convert(base, read=reading).run(out)
    assert {part_of(path) for path in read} == set(PARTS[finished:])
    assert_equal(arrays(out), arrays(tmp_path / "whole"))
    assert manifest.report == checkpoint.read_manifest(tmp_path / "whole").report
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base", "out", "whole"]


def test_a_half_carried_component_is_carried_again(tmp_path, base, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (conversion, "copy_synced"), 0)
        job = convert(base)
        item = dataclasses.replace(
            job.carried[0], write=lambda path: conversion.copy_synced(path, base / "vae")
        )
        dataclasses.replace(job, carried=(item,)).run(tmp_path / "out")
    convert(base).run(tmp_path / "out")
    assert [x.name for x in (tmp_path / "out" / "vae").iterdir()] == ["weights.bin"]


def test_a_finished_part_that_was_damaged_since_is_done_again(tmp_path, base, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 2)
        convert(base).run(out)
    damaged = files.work_folder(out) / "contents" / "transformer" / "blocks.0"
    (damaged / "state" / "_METADATA").write_text("")
    convert(base).run(out)
    model, _ = quantize_model(build(), RECIPE)
    assert_equal(arrays(out), stored_arrays(nnx.state(model)))


def test_unfinished_work_is_no_checkpoint(tmp_path, base, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 2)
        convert(base).run(tmp_path / "out")
    for folder in files.work_folder(tmp_path / "out").iterdir():
        assert not checkpoint.is_checkpoint(folder)


def test_unfinished_work_of_another_recipe_is_refused_and_overwrite_starts_anew(
    tmp_path, base, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 1)
        convert(base).run(out)
    other = Recipe(name="int8", rules=(rule(".*", INT8),))
    with pytest.raises(ValueError, match="unfinished work of another model, recipe"):
        convert(base, recipe=other).run(out)
    convert(base, recipe=other).run(out, overwrite=True)
    assert_equal(arrays(out), stored_arrays(nnx.state(quantize_model(build(), other)[0])))


def test_unfinished_work_of_a_changed_base_is_refused(tmp_path, base, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 1)
        convert(base).run(tmp_path / "out")
    save_file({"x": np.ones(4)}, base / "model.safetensors")
    with pytest.raises(ValueError, match="unfinished work"):
        convert(base).run(tmp_path / "out")


def test_a_second_process_is_refused(tmp_path, base):
    with (
        files.resumable_folder(tmp_path / "out", "other", incurable=ValueError),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        convert(base).run(tmp_path / "out")


def test_at_most_one_part_is_read_ahead(tmp_path, base, monkeypatch):
    params = {".".join(map(str, k)): x for k, x in nnx.to_flat_state(nnx.state(build()))}
    read, ahead, real = [], [], checkpoint.write_part

    def reading(path):
        read.append(part_of(path))
        return np.asarray(params[path][...])

    def write(folder, arrays):
        ahead.append(set(read) - {folder.name})
        read[:] = [part for part in read if part != folder.name]
        return real(folder, arrays)

    monkeypatch.setattr(checkpoint, "write_part", write)
    convert(base, read=reading).run(tmp_path / "out")
    assert max(map(len, ahead)) <= 1


def test_nan_in_a_weight_is_refused_by_its_layer_and_leaves_nothing(tmp_path, base):
    with pytest.raises(ValueError, match=r"weight of blocks\.1\.up holds NaN"):
        convert(base, model=poison(build())).run(tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["base"]


def test_too_little_disk_is_refused_before_any_work(tmp_path, base, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs 0\.00 GB and its disk has 0\.00 GB free"):
        convert(base).run(tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["base"]


@contextmanager
def small_files():
    """Let writing a file of more than 1000 bytes fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", ["write_part", "write_manifest"])
def test_a_failed_write_keeps_the_work_and_is_one_line(tmp_path, base, monkeypatch, capfd, what):
    def fail(folder, *args):
        if folder.name == PARTS[0]:
            return real(folder, *args)
        with small_files():
            return real(folder, *args)

    out, real = tmp_path / "out", getattr(checkpoint, what)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, what, fail)
        assert cli.run(lambda _: convert(base).run(out)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: output {out} can't be written: [Errno 27] File too large")
    assert line.endswith("; run the same command again to go on")
    written, write = [], checkpoint.write_part
    monkeypatch.setattr(
        checkpoint, "write_part", lambda x, y: written.append(x.name) or write(x, y)
    )
    convert(base).run(out)
    assert written == (PARTS[1:] if what == "write_part" else [])


def test_what_is_finished_needs_no_room_again(tmp_path, base, monkeypatch):
    job = convert(base)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 2)
        job.run(tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=job.bytes - 1))
    job.run(tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, base):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        convert(base).run(tmp_path / "file" / "out")


def test_overwrite_replaces_a_checkpoint_and_an_interruption_keeps_it(tmp_path, base, monkeypatch):
    out = tmp_path / "out"
    convert(base).run(out)
    with pytest.raises(ValueError, match="exists already"):
        convert(base).run(out)
    (out / "stale").write_text("")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, (checkpoint, "write_part"), 1)
        convert(base).run(out, overwrite=True)
    assert (out / "stale").exists()
    convert(base).run(out, overwrite=True)
    assert not (out / "stale").exists()


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_while_the_old_checkpoint_is_replaced_is_recovered_from(
    tmp_path, base, monkeypatch, renames
):
    out, real = tmp_path / "out", {"replace": os.replace, "rmtree": shutil.rmtree}
    old = tmp_path / ".out.replaced"

    def kill(name, *args, **options):
        if old.exists() and name == ("replace" if renames == 1 else "rmtree"):
            raise Interrupted
        return real[name](*args, **options)

    convert(base).run(out)
    (out / "old").touch()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "replace", functools.partial(kill, "replace"))
        patch.setattr(shutil, "rmtree", functools.partial(kill, "rmtree"))
        convert(base).run(out, overwrite=True)
    assert old.exists()
    assert out.exists() == (renames == 2)
    with pytest.raises(ValueError, match="exists already"):
        convert(base).run(out)
    assert (out / "old").exists() == (renames == 1)
    convert(base).run(out, overwrite=True)
    assert not (out / "old").exists()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["base", "out"]


def test_links_do_not_hide_that_the_output_holds_its_source(tmp_path, base):
    """As in a hub's cache, where the files of a model are links to a folder of contents."""
    (tmp_path / "blobs").mkdir()
    blob = (base / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    (base / "model.safetensors").symlink_to(blob)
    (tmp_path / "link").symlink_to(base)
    for out in (base, tmp_path / "link", tmp_path / "blobs"):
        (out / "quartz.json").touch()
        for model in (base, tmp_path / "link"):
            with pytest.raises(ValueError, match="which it is made from"):
                convert(model).run(out, overwrite=True)
    assert (base / "model.safetensors").exists()


def test_the_plan_counts_what_will_be_stored(tmp_path, base):
    job = convert(base)
    report = job.run(tmp_path / "out").report
    assert sum(part.bytes for part in job.sources[0].parts) == report.bytes
    assert f"{report.bytes:,} bytes of {report.bytes_bf16:,}" in job.plan()
    assert f"{report.layers[0].bytes:,}" in job.plan()
    stored = sum(x.stat().st_size for x in (tmp_path / "out").rglob("*") if x.is_file())
    manifest = (tmp_path / "out" / "quartz.json").stat().st_size
    assert stored - manifest < job.bytes


def test_the_base_hash_is_that_of_the_files(tmp_path, base):
    manifest = convert(base).run(tmp_path / "out")
    expected = files.hash_files(base, "*.safetensors")
    assert manifest.components["transformer"].base_sha256 == expected


def test_an_empty_folder_is_not_carried(tmp_path):
    with pytest.raises(ValueError, match="is empty; expected the files of a component"):
        Carried.copy(tmp_path)


def test_a_record_of_nothing_is_none(tmp_path):
    with files.resumable_folder(tmp_path / "out", {"a": (1, 2)}, incurable=ValueError) as work:
        assert work.read_record("absent") is None
        work.write_record("there", [1])
        assert work.read_record("there") == [1]
        assert json.loads((work.records / "identity.json").read_text()) == {"a": [1, 2]}


@pytest.mark.parametrize("as_numpy", [True, False])
def test_a_weight_in_slices_is_the_weight_at_once(monkeypatch, as_numpy):
    kernel = build().blocks[0].up.kernel.get_value()
    layer = RECIPE.rules[0].layer
    whole, report = quantize_layer("x", kernel.T, None, layer)
    monkeypatch.setattr("quartz_jax.conversion.model._ELEMENTS_AT_ONCE", 8 * kernel.shape[0])
    given = np.ascontiguousarray(np.asarray(kernel).T) if as_numpy else kernel.T
    sliced, sliced_report = quantize_layer("x", given, None, layer)
    assert_equal = np.testing.assert_array_equal
    jax.tree.map(assert_equal, (sliced.weight, sliced.ops), (whole.weight, whole.ops))
    # Two float32 sums of that many squares, in different orders; the root halves their errors.
    bound = kernel.size * 2.0**-24
    assert sliced_report.relative_error == pytest.approx(report.relative_error, rel=bound)
