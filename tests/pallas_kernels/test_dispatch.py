"""Which backend runs, and what is said when none can."""

import jax.numpy as jnp
import pytest

from pallas_kernels import device, dispatch
from pallas_kernels.matmul import MATMUL, MATMUL_INT8
from pallas_kernels.quantize import QUANTIZE

HERE = device.current().platform


def operation():
    """Build a fast backend that takes even numbers only, and a slow one that takes all."""
    fast = dispatch.Backend(
        name="fast",
        run=lambda x: ("fast", x),
        why_not=lambda device, x: f"x is {x}, odd" if x % 2 else None,
    )
    never = dispatch.Backend(
        name="never",
        run=lambda x: ("never", x),
        why_not=lambda device, x: f"it needs a loom, not a {device.platform}",
    )
    slow = dispatch.Backend(name="slow", run=lambda x: ("slow", x))
    return dispatch.Operation(name="op", backends=(never, fast, slow))


@pytest.mark.parametrize(("x", "name"), [(2, "fast"), (3, "slow")])
def test_without_a_name_the_first_backend_that_can_runs(x, name):
    assert operation()(x) == (name, x)


def test_a_named_backend_runs_though_a_better_one_could():
    assert operation()(2, implementation="slow") == ("slow", 2)


def test_of_several_names_the_first_that_can_runs():
    assert operation()(3, implementation=["never", "fast", "slow"]) == ("slow", 3)


def test_a_named_backend_that_cannot_run_raises_with_its_reason():
    with pytest.raises(ValueError, match="fast: x is 3, odd"):
        operation()(3, implementation="fast")


def test_several_named_backends_that_cannot_run_raise_with_every_reason():
    with pytest.raises(
        ValueError, match=rf"never: it needs a loom, not a {HERE}; fast: x is 3, odd"
    ):
        operation()(3, implementation=["never", "fast"])


def test_an_unknown_name_raises_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown implementation 'quick'; known are never, fast"):
        operation()(2, implementation="quick")


def test_explain_tells_what_runs_and_why_the_others_do_not():
    assert operation().explain(2).splitlines() == [
        f"op/never: it needs a loom, not a {HERE}",
        "op/fast: runs",
        "op/slow: not needed",
    ]


def test_explain_tells_when_nothing_named_can_run():
    assert operation().explain(3, implementation="fast") == "op/fast: x is 3, odd"


@pytest.mark.parametrize("op", [MATMUL, MATMUL_INT8, QUANTIZE], ids=lambda op: op.name)
def test_every_operation_has_a_reference_that_takes_anything_anywhere(op):
    reference = next(backend for backend in op.backends if backend.name == "reference")
    assert reference.why_not(None, jnp.ones((1, 1))) is None
