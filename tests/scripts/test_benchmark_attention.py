"""The script that times 8-bit attention: what it measures, marks and records."""

import json

import benchmark_attention
import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def tiny(monkeypatch):
    work = benchmark_attention.Work(tokens=(3, 60), heads=1, head_dim=32)
    monkeypatch.setattr(benchmark_attention, "WORKS", {"tiny": work})
    times = iter(range(1, 100))  # seconds a call, of each batch
    measure = lambda *_, batches: [next(times) / 1e3] * batches  # noqa: E731
    monkeypatch.setattr(benchmark_attention.timing, "measure", measure)


def run(path):
    status = benchmark_attention.main(["--seed", "1", "--batches", "2", "--out", str(path)])
    return status, {row["variant"]: row for row in json.loads(path.read_text())["rows"]}


def test_every_variant_is_checked_and_compared_with_bfloat16(tiny, tmp_path):
    status, rows = run(tmp_path / "x.json")
    assert status == 0
    names = ["bf16", "pass bf16", "pass int8", "int8", "int8 scaled values", "int8 outliers"]
    assert list(rows) == names
    assert [rows[name]["times_ms"] for name in names] == [[i, i] for i in (1, 2, 3, 4)] + [[], []]
    assert rows["int8"]["of_cudnn"] == 1 / 4
    assert rows["int8"]["of_bf16"] == (1 + 2) / (4 + 3)
    assert rows["pass int8"]["checks"]["q differing"] == 0
    assert 0.01 < rows["int8"]["checks"]["error"] < benchmark_attention.ERROR
    for name in names[3:]:
        assert rows[name]["checks"]["to reference"] == 0


def test_inputs_are_of_many_values_around_zero():
    """Of few, float8 rounds each alike, and the errors of a long sum don't average out."""
    work = benchmark_attention.Work(tokens=(512, 512), heads=1)
    streams, _ = benchmark_attention.make_inputs(jax.random.key(0), work)
    for stream in streams:
        x = np.asarray(stream["qkv"], np.float64)
        assert len(np.unique(x)) > 1000
        assert abs(x.mean()) < 0.005


def test_a_variant_that_fails_or_is_wrong_is_marked_and_the_rest_runs(tiny, tmp_path, monkeypatch):
    def broken(heads, *, config=None):
        if heads.v_scale is None:
            raise RuntimeError("a kernel that fails")
        return jnp.full((1, 63, 1, 32), jnp.nan, jnp.bfloat16) + 0 * heads.q_scale[0, 0, 0]

    monkeypatch.setattr(benchmark_attention, "attention_int8", broken)
    status, rows = run(tmp_path / "x.json")
    assert status == 1
    assert rows["int8"]["error"] == "RuntimeError: a kernel that fails"
    assert rows["int8 outliers"]["wrong"]
    assert rows["pass int8"]["ms"] == 3
    assert not rows["pass int8"]["wrong"]
