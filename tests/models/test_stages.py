"""Loading ahead: which models, in which order, and what becomes of errors and of what is left."""

import threading

import pytest
from flax import nnx

from models import stages
from models.stages import Ahead, Deferred


def deferred(loaded, name, size, **more):
    def load():
        loaded.append((name, threading.current_thread().name))
        if "error" in more:
            raise more["error"]
        return nnx.Module()

    return Deferred(config=None, load=load, bytes=size)


@pytest.fixture
def device_of_100_bytes(monkeypatch):
    monkeypatch.setattr(stages, "memory_limit", lambda: 100)


def test_the_first_that_fit_together_are_loaded_in_order_in_a_thread(device_of_100_bytes):
    loaded, sizes = [], {"a": 20, "b": 30, "c": 11, "d": 1}
    ahead = Ahead({name: deferred(loaded, name, size) for name, size in sizes.items()})
    assert ahead.take("b") is not None and ahead.take("a") is not None
    assert ahead.take("c") is None and ahead.take("d") is None  # 61 of 60 bytes, and behind it
    assert [name for name, _ in loaded] == ["a", "b"]
    assert all(thread.startswith("loading") for _, thread in loaded)
    assert ahead.take("a") is None  # taken already
    ahead.close()


def test_none_is_loaded_ahead_where_memory_or_size_is_not_known(device_of_100_bytes, monkeypatch):
    loaded = []
    ahead = Ahead({"a": deferred(loaded, "a", None), "b": deferred(loaded, "b", 1)})
    assert ahead.take("a") is None and ahead.take("b") is None
    monkeypatch.setattr(stages, "memory_limit", lambda: None)
    assert Ahead({"a": deferred(loaded, "a", 1)}).take("a") is None
    assert not loaded


def test_an_error_comes_where_the_model_is_needed(device_of_100_bytes):
    ahead = Ahead({"a": deferred([], "a", 1, error=ValueError("no such file"))})
    with pytest.raises(ValueError, match="no such file"):
        ahead.take("a")
    ahead.close()


def test_what_is_loaded_already_stays_as_it_is(device_of_100_bytes):
    loaded = []
    ahead = Ahead({"a": nnx.Module(), "b": deferred(loaded, "b", 1)})
    assert ahead.take("a") is None and ahead.take("b") is not None
    ahead.close()
