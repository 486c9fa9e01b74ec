"""Traced programs on disk: the same results, the same names elsewhere, or none kept at all."""

import dataclasses
import functools
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import compiled as compiling
from models import programs
from models.compiled import compiled


class Layer(nnx.Module):
    def __init__(self, width: int, act=jax.nn.relu, seed=0):
        self.linear = nnx.Linear(width, width, rngs=nnx.Rngs(seed))
        self.act = act

    def __call__(self, x):
        return self.act(self.linear(x)), {"sum": x.sum()}


def run(module, x, *more):
    return module(x), more


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Take this file for one of the library's."""
    others = set(programs._KNOWN)
    monkeypatch.setattr(programs, "_KNOWN", {*others, __name__.split(".")[0]})
    return others


@pytest.fixture
def kept(tmp_path):
    programs.keep(tmp_path)
    programs.counts.clear()
    yield tmp_path
    programs.keep(None)


def forget():
    """Do as if the process had just begun."""
    compiling._jitted.cache_clear()


def test_a_kept_program_gives_the_same_bits_as_a_traced_one(kept):
    x = jnp.arange(8.0).reshape(2, 4)
    programs.keep(None)
    plain = compiled(run, Layer(4))(x, {"a": np.float32(2)})
    programs.keep(kept)
    traced = compiled(run, Layer(4))(x, {"a": np.float32(2)})
    forget()
    again = compiled(run, Layer(4))(x, {"a": np.float32(2)})
    assert programs.counts == {"traced": 1, "kept": 1}
    for found in (traced, again):
        jax.tree.map(np.testing.assert_array_equal, plain, found)
        assert jax.tree.structure(plain) == jax.tree.structure(found)


def test_a_model_that_is_loaded_again_runs_what_was_found(kept):
    x, layer, events = jnp.ones((2, 4)), Layer(4, seed=1), []

    def note(event, *_, **__):
        events.append("compile" in event or "mlir" in event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        first = compiled(run, Layer(4))(x)
        assert any(events)
        events.clear()
        again = compiled(run, layer)(x)
        assert not any(events)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert programs.counts == {"traced": 1}
    np.testing.assert_allclose(again[0][0], layer(x)[0], rtol=1e-6)  # its own weights
    assert not np.array_equal(first[0][0], again[0][0])


def test_programs_hold_no_weights(kept):
    for act in (jax.nn.relu, lambda x: 2 * x):  # kept, and one that can't be
        layer = Layer(4, act)
        gone = weakref.ref(layer.linear.kernel.get_value())
        compiled(run, layer)(jnp.ones((2, 4)))
        del layer
        gc.collect()
        assert gone() is None


def test_another_precision_is_another_program(kept):
    compiled(run, Layer(4))(jnp.ones((2, 4)))
    with jax.default_matmul_precision("highest"):
        compiled(run, Layer(4))(jnp.ones((2, 4)))
    assert programs.counts == {"traced": 2}


def test_another_shape_dtype_or_module_is_another_program(kept):
    for width, rows, dtype in ((4, 2, "f4"), (4, 3, "f4"), (4, 2, "bf2"), (8, 2, "f4")):
        x = jnp.ones((rows, width), jnp.bfloat16 if dtype == "bf2" else jnp.float32)
        made, _ = compiled(run, Layer(width))(x)
        assert made[0].shape == (rows, width)
    compiled(run, Layer(4, jax.nn.tanh))(jnp.ones((2, 4)))
    assert programs.counts == {"traced": 5}
    assert len(list(kept.iterdir())) == 5


def test_what_has_no_name_elsewhere_runs_and_is_not_kept(kept):
    made, _ = compiled(run, Layer(4, lambda x: 2 * x))(jnp.ones((2, 4)))
    assert made[0].shape == (2, 4)
    assert not list(kept.iterdir())


def test_code_of_others_runs_and_is_not_kept(kept, known, monkeypatch):
    monkeypatch.setattr(programs, "_KNOWN", known)
    made, _ = compiled(run, Layer(4))(jnp.ones((2, 4)))
    assert made[0].shape == (2, 4)
    assert not list(kept.iterdir())


def test_a_program_within_another_is_a_part_of_that(kept):
    graph, state = nnx.split(Layer(4))
    x = jnp.ones((2, 4))
    shapes = jax.eval_shape(lambda state: compiled(run, nnx.merge(graph, state))(x), state)
    assert shapes[0][0].shape == (2, 4)
    assert not programs.counts


def test_a_damaged_program_is_traced_anew_and_mended(kept):
    x = jnp.ones((2, 4))
    wanted = compiled(run, Layer(4))(x)
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    forget()
    found = compiled(run, Layer(4))(x)
    jax.tree.map(np.testing.assert_array_equal, wanted, found)
    assert programs.counts["kept"] == 0
    assert len(path.read_bytes()) == len(whole)


def test_a_folder_that_cannot_be_written_costs_a_warning(kept):
    file = kept / "file"
    file.touch()
    programs.keep(file / "below")
    with pytest.warns(UserWarning, match="can't be written"):
        made, _ = compiled(run, Layer(4))(jnp.ones((2, 4)))
    assert made[0].shape == (2, 4)


def test_an_error_of_the_module_comes_through(kept):
    with pytest.raises(TypeError):
        compiled(run, Layer(4))(jnp.ones((2, 5)))


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    function: object


def test_names_are_those_of_another_process():
    code = (
        "import functools, jax, jax.numpy as jnp\n"
        "from models import programs\n"
        "print(programs.name([{'b': 1, 'a': (2.5, None)}, jnp.bfloat16, {'x', 'y', 'z'},"
        " functools.partial(jax.nn.gelu, approximate=True)]))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    made = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    assert made[0] == made[1] and "gelu" in made[0]


@pytest.mark.parametrize("one", [Part(1, jax.nn.relu), Part(1, functools.partial(run, 1))])
def test_names_tell_parts_apart(one):
    assert programs.name(one) != programs.name(dataclasses.replace(one, size=2))
    assert programs.name(one) != programs.name(dataclasses.replace(one, function=run))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_names_tell_large_arrays_apart(kind):
    values = np.arange(5000.0)
    other = np.where(values == 2500, 0, values)
    assert programs.name(kind(values)) == programs.name(kind(values.copy()))
    assert programs.name(kind(values)) != programs.name(kind(other))
    assert programs.name(kind(values)) != programs.name(kind(values.reshape(50, 100)))


def test_nothing_and_its_type_have_names():
    assert programs.name(None) != programs.name(type(None))


class Odd:
    def __repr__(self):
        return "Odd"


def test_values_of_classes_of_others_have_no_name(known, monkeypatch):
    assert programs.name(Odd()).endswith("Odd Odd")
    monkeypatch.setattr(programs, "_KNOWN", known)
    with pytest.raises(programs.Unnamed):
        programs.name(Odd())


def test_the_structure_of_weights_has_a_name():
    assert "{'a': *}" in programs.name(jax.tree.structure({"a": 1}))


@pytest.mark.parametrize("odd", [lambda x: x, object(), functools.partial(lambda x: x)])
def test_what_another_process_has_otherwise_has_no_name(odd):
    with pytest.raises(programs.Unnamed):
        programs.name(odd)
