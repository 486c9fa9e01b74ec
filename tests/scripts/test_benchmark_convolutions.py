"""The benchmark of convolutions on one small shape: every way runs, and XLA's is the same."""

import json

import benchmark_convolutions


def test_every_way_is_timed_and_the_integers_are_the_same(tmp_path, capsys):
    out = tmp_path / "times.json"
    argv = ["--shapes", "1", "--scale", "20", "--batches", "1", "--recipes", "w4a8x"]
    assert benchmark_convolutions.main([*argv, "--out", f"{out}"]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["bf16", "matmul", "xla", "window"]
    assert all(row["ms"] > 0 for row in rows)
    assert rows[2]["same"] is True
    assert "all of a step" in capsys.readouterr().out
