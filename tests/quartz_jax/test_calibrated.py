"""Conversion with statistics, block by block: the arrays of the one in memory, killed or not."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import MIXED, QUARTZ, STEPPED, Block, Stepped, build, build_stepped, rule, samples
from flax import nnx

from quartz_jax import Recipe, observe, quantize_model, sites
from quartz_jax.conversion import checkpoint
from quartz_jax.conversion.calibrate import BlockRun, Calibration, in_order
from quartz_jax.conversion.checkpoint import CalibrationRecord
from quartz_jax.conversion.model import plan_parts, stored_arrays
from quartz_jax.conversion.stream import Carried, Conversion, Source
from quartz_jax.io.files import work_folder
from quartz_jax.rounding import Gptq
from quartz_jax.transforms import Smooth

# Smaller than `MIXED`: each block is calibrated, and what lies outside has a plain format.
RECIPE = Recipe(
    name="calibrated",
    rules=(
        rule(r"layers\.\d+\.up", QUARTZ, QUARTZ, transforms=(Smooth(),)),
        rule(r"layers\.\d+\.down", QUARTZ, rounding=Gptq()),
        rule("embed", QUARTZ),
    ),
)
RECORD = CalibrationRecord(
    prompts_sha256="0" * 64, samples=4, steps=(0,), seed=0, propagate=False, size=(32, 32)
)
PARTS = ["other", "layers.0", "layers.1", "layers.2"]


class Interrupted(BaseException):
    """Like a kill: nothing catches it."""


def params_of(model):
    return {
        ".".join(map(str, path)): np.asarray(x[...])
        for path, x in nnx.to_flat_state(nnx.state(model))
    }


def convert(folder, *, make=samples, recipe=RECIPE, build=build_stepped, **record):
    """Return a calibrated conversion of a model whose file is beside its output."""
    file = folder / "model.safetensors"
    if not file.exists():
        file.write_bytes(b"weights")
        (folder / "vae").mkdir()
        (folder / "vae" / "weights.bin").write_bytes(b"vae")
    record = dataclasses.replace(RECORD, **record)
    source = Source(
        name="transformer",
        recipe=recipe,
        model=nnx.eval_shape(build),
        read=params_of(build()).__getitem__,
        config=STEPPED,
        files=(file,),
        calibration=make and Calibration(make=make, record=record),
    )
    carried = (Carried.copy(folder / "vae"),)
    return Conversion(base_name="base", sources=(source,), carried=carried)


def arrays(folder, build=build_stepped):
    model, _ = checkpoint.load(folder, lambda _: build())
    return {name: np.asarray(x) for name, x in stored_arrays(nnx.state(model)).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Arrays of uninterrupted conversions, by whether samples see what quantized blocks make."""
    folder = tmp_path_factory.mktemp("whole")
    found = {}
    for propagate in (False, True):
        out = folder / str(propagate)
        manifest = convert(folder, propagate=propagate).run(out)
        record = manifest.components["transformer"].calibration
        assert record == dataclasses.replace(RECORD, propagate=propagate)
        found[propagate] = arrays(out)
    return found


def in_memory(model, recipe):
    return quantize_model(model, recipe, observe(model, samples(), recipe.needs(sites(model))))


def test_the_arrays_and_the_report_are_those_of_the_model_that_was_observed(tmp_path, whole):
    model, report = in_memory(build_stepped(), RECIPE)
    assert_equal(whole[False], stored_arrays(nnx.state(model)))
    found = convert(tmp_path).run(tmp_path / "out").report
    assert sorted(found.layers, key=lambda x: x.path) == sorted(report.layers, key=lambda x: x.path)
    assert found.bytes == report.bytes


def test_what_quantized_blocks_make_changes_the_blocks_behind_them_alone(whole):
    changed = {
        name for name, array in whole[False].items() if not np.array_equal(array, whole[True][name])
    }
    assert {name.rpartition(".weight")[0] for name in changed} >= {"layers.1.down", "layers.2.down"}
    assert not any(name.startswith(("embed", "layers.0", "head")) for name in changed)


def stop_at(monkeypatch, call):
    """Let writing part number `call` do half of its work and stop."""
    real, calls = checkpoint.write_part, []

    def stop(folder, arrays):
        calls.append(folder.name)
        if len(calls) > call:
            folder.mkdir(parents=True)
            (folder / "half").write_text("written")
            raise Interrupted
        return real(folder, arrays)

    monkeypatch.setattr(checkpoint, "write_part", stop)


def never():
    raise AssertionError("samples were made before, and are kept")


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("finished", [1, 3])
def test_after_an_interruption_the_rest_gives_the_same_arrays(
    tmp_path, monkeypatch, whole, finished, propagate
):
    out, written = tmp_path / "out", []
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, finished)
        convert(tmp_path, propagate=propagate).run(out)
    assert not out.exists()
    real = checkpoint.write_part
    monkeypatch.setattr(checkpoint, "write_part", lambda x, y: written.append(x.name) or real(x, y))
    convert(tmp_path, make=never, propagate=propagate).run(out)
    assert written == PARTS[finished:]
    assert_equal(arrays(out), whole[propagate])


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from quartz_jax.conversion import checkpoint
from test_calibrated import convert
real, calls = checkpoint.write_part, []
def write(folder, arrays):
    calls.append(real(folder, arrays))
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]
checkpoint.write_part = write
convert(Path(sys.argv[1]), propagate=True).run(Path(sys.argv[1]) / "out")
"""


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_after_the_process_was_killed_the_rest_gives_the_same_arrays(tmp_path, whole):
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(here), str(here.parents[1])]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    out = tmp_path / "out"
    assert not out.exists()
    finished = {x.stem for x in (work_folder(out) / "records").glob("transformer.*.json")}
    assert finished == {"transformer.other", "transformer.layers.0"}
    convert(tmp_path, make=never, propagate=True).run(out)
    assert_equal(arrays(out), whole[True])


@pytest.mark.parametrize(
    "other",
    [
        {"prompts_sha256": "1" * 64},
        {"seed": 1},
        {"steps": (1,)},
        {"propagate": True},
        {"size": (64, 32)},
    ],
)
def test_unfinished_work_with_other_samples_is_refused(tmp_path, monkeypatch, other):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 0)
        convert(tmp_path).run(tmp_path / "out")
    with pytest.raises(ValueError, match="holds unfinished work of another model"):
        convert(tmp_path, **other).run(tmp_path / "out")


def test_unfinished_work_with_another_vae_of_the_same_size_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 0)
        convert(tmp_path).run(tmp_path / "out")
    (tmp_path / "vae" / "weights.bin").write_bytes(b"eva")
    with pytest.raises(ValueError, match="holds unfinished work of another model"):
        convert(tmp_path).run(tmp_path / "out")


def refused(folder, **options):
    """Return the one line of a conversion that is refused before it starts."""
    job = convert(folder, **options)
    with pytest.raises(ValueError, match=r".") as error:
        job.run(folder / "out")
    assert {x.name for x in folder.iterdir()} == {"model.safetensors", "vae"}
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_calibrated_recipe_without_samples_is_refused(tmp_path):
    line = refused(tmp_path, make=None)
    assert line.startswith("recipe 'calibrated' is calibrated and there are no samples for this")


def test_a_model_that_cannot_be_run_block_by_block_is_refused(tmp_path):
    recipe = Recipe(name="gptq", rules=(rule(".*", QUARTZ, rounding=Gptq()),))
    line = refused(tmp_path, recipe=recipe, build=build)
    assert line.startswith("Model can't be run block by block, so recipe 'gptq', which is calibr")


def test_a_calibrated_layer_outside_of_blocks_is_refused_by_name(tmp_path):
    recipe = Recipe(name="gptq", rules=(rule(".*", QUARTZ, rounding=Gptq()),))
    line = refused(tmp_path, recipe=recipe)
    assert line.startswith("recipe 'gptq' would calibrate head, which lies in none of the model")


@pytest.mark.parametrize("propagate", [False, True])
def test_a_layer_before_the_blocks_is_calibrated_where_the_model_names_it(tmp_path, propagate):
    layer = {"activation": QUARTZ, "transforms": (Smooth(),), "rounding": Gptq()}
    recipe = Recipe(name="gptq", rules=(rule("embed", QUARTZ, **layer),))
    convert(tmp_path, recipe=recipe, propagate=propagate).run(tmp_path / "out")
    model, _ = in_memory(build_stepped(), recipe)
    assert_equal(arrays(tmp_path / "out"), stored_arrays(nnx.state(model)))


def test_a_list_of_layers_that_are_no_blocks_is_refused_by_name(tmp_path):
    """Its arrays were left out of the checkpoint."""

    class Refined(Stepped):
        def __init__(self, rngs):
            super().__init__(**STEPPED, rngs=rngs)
            self.refiner = nnx.List([nnx.Linear(32, 32, rngs=rngs)])

        def start(self, *, x):
            return self.refiner[0](super().start(x=x))

    line = refused(tmp_path, build=lambda: Refined(nnx.Rngs(0)))
    assert line.startswith("Refined holds a list with refiner.0, which isn't one of its blocks()")


def test_a_model_that_is_nothing_but_blocks_sees_its_samples(tmp_path):
    class Bare(nnx.Module):
        advance = staticmethod(Stepped.advance)

        def __init__(self):
            self.layers = nnx.List([Block(32, nnx.Rngs(0))])

        def blocks(self):
            return [("layers.0", self.layers[0])]

        def start(self, *, x):
            return x

        def __call__(self, x):
            return self.layers[0](x)

    recipe = Recipe(name="gptq", rules=(rule(".*", QUARTZ, rounding=Gptq()),))
    convert(tmp_path, recipe=recipe, build=Bare).run(tmp_path / "out")
    model, _ = in_memory(Bare(), recipe)
    assert_equal(arrays(tmp_path / "out", Bare), stored_arrays(nnx.state(model)))


def test_samples_come_back_from_their_file_as_they_were_made(tmp_path):
    made = [
        {"x": jnp.float32([[1, 2]]), "y": jnp.bfloat16([3.5]), "t": np.float32(0.25), "none": None},
        {"x": jnp.float32([[3, 4]]), "y": jnp.bfloat16([4.5]), "t": np.float32(0.5), "none": None},
    ]
    first = Calibration(make=lambda: made, record=RECORD).load(tmp_path / "samples.npz")
    again = Calibration(make=never, record=RECORD).load(tmp_path / "samples.npz")
    for found in (first, again):
        for sample, expected in zip(found, made, strict=True):
            assert sample.keys() == {"x", "y", "t"}
            for name, array in sample.items():
                assert array.dtype == expected[name].dtype
                np.testing.assert_array_equal(array, expected[name])


def test_defect_8_statistics_of_a_block_do_not_grow_with_the_number_of_samples():
    """Every sampled row of every call of every linear was kept on the host."""
    params, model = params_of(build_stepped()), nnx.eval_shape(build_stepped)
    other, block = in_order(model, plan_parts(model, MIXED))[:2]
    assert [other.name, block.name] == PARTS[:2]
    sizes, held = [], []
    for count in (1, 8):
        run = BlockRun(model, samples(count=count))
        run.advance(other, params, MIXED)
        seen = run.observe(block, params)
        assert seen.keys() == {"layers.0.up"}  # the other one isn't calibrated
        gathered = dataclasses.replace(seen["layers.0.up"], rows=None)
        sizes.append(sum(x.size for x in jax.tree.leaves(gathered)))
        run.advance(block, params, MIXED)
        held.append(sum(x.size for x in jax.tree.leaves(run.carries)) / count)
    assert sizes[0] == sizes[1]
    assert held[0] == held[1] == samples()[0]["x"].size  # the samples, where they are by now
