"""The scripts that time kernels and steps: what they refuse, compare, time and record."""

import dataclasses
import json
import re
import statistics

import aot_report
import benchmark
import benchmark_model
import jax
import jax.numpy as jnp
import make_synthetic
import pytest
import tune
from small_flux import SIZES

from models.flux.family import FLUX
from pallas_kernels.matmul import MATMUL_INT8
from pallas_kernels.matmul.shapes import Shape
from pallas_kernels.quantize import QUANTIZE
from quartz_jax.cli import arguments as cli
from quartz_jax.io import provenance

MAINS = {
    "benchmark": benchmark.main,
    "tune": tune.main,
    "benchmark_model": benchmark_model.main,
    "aot_report": aot_report.main,
    "make_synthetic": make_synthetic.main,
}


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(benchmark, "SHAPES", {"tiny": Shape(m=4, n=48, k=64)})
    monkeypatch.setattr(benchmark, "QUANTIZE_SHAPES", ((4, 64),))
    monkeypatch.setattr(benchmark, "QK_SHAPES", (((1, 3), 9300),))
    monkeypatch.setattr(benchmark, "COPIED", 1024)
    monkeypatch.setattr(benchmark, "SETS_BYTES", 1)
    monkeypatch.setattr(benchmark, "PEAK", {"cpu": {"int8": 2e9, "bfloat16": 1e9}})
    times = iter(range(1, 1000))  # seconds a call, of each batch
    monkeypatch.setattr(
        benchmark.timing, "measure", lambda *_, batches: [next(times) / 1e3 for _ in range(batches)]
    )


def run_benchmark(path, *argv):
    status = benchmark.main(["--batches", "3", "--out", str(path), *argv])
    return status, json.loads(path.read_text())


def test_ratios_are_those_of_the_times_in_the_file(tiny_shapes, tmp_path, capsys):
    status, results = run_benchmark(tmp_path / "x.json")
    rows = {row["backend"]: row for row in results["rows"]}
    assert status == 0
    packed = ["g16 xla", "g16 stretched xla", "g16 stretched branch xla", "w4a16 xla"]
    assert list(rows) == ["bfloat16 xla", "int8 xla", *packed, "reference"]
    assert [row["exact"] for row in rows.values()] == [None, *[True] * 6]
    rotation = rows.pop("reference")
    assert rotation["work"] == "qk_norm_rope 1+3"
    assert rotation["bytes_moved"] == 2 * 4 * 9216 * 2
    for row in rows.values():
        assert row["ms"] == statistics.median(row["times_ms"])
        assert row["of_bf16"] == rows["bfloat16 xla"]["ms"] / row["ms"]
        rate = 1e9 if row["backend"] in ("bfloat16 xla", "w4a16 xla") else 2e9
        bandwidth = row["bytes_moved"] / results["copy_bytes_per_second"]
        limit = max(row["operations"] / rate, bandwidth)
        assert row["of_limit"] == pytest.approx(1e3 * limit / row["ms"])
    assert rows["g16 xla"]["of_int8"] == rows["int8 xla"]["ms"] / rows["g16 xla"]["ms"]
    assert rows["int8 xla"]["of_int8"] is rows["w4a16 xla"]["of_int8"] is None
    for line in capsys.readouterr().out.splitlines()[2:-1]:
        row = rows[line[29:61].strip()]
        shown = {name: float(x) for x, name in re.findall(r"([\d.]+) (ms|of bf16|of int8)", line)}
        assert shown["ms"] == pytest.approx(row["ms"], abs=1e-4)
        assert shown["of bf16"] == pytest.approx(row["of_bf16"], abs=0.0051)
        assert int(re.search(r"(\d+)% of limit", line)[1]) == round(100 * row["of_limit"])


@pytest.mark.parametrize("off", [1.0, float("nan")])
def test_a_wrong_backend_is_reported_and_not_timed(tiny_shapes, tmp_path, capsys, monkeypatch, off):
    wrong = dataclasses.replace(
        MATMUL_INT8.backend("xla"),
        name="wrong",
        run=lambda *args: MATMUL_INT8.backend("xla").run(*args) + off,
    )
    operation = dataclasses.replace(MATMUL_INT8, backends=(*MATMUL_INT8.backends, wrong))
    monkeypatch.setattr(benchmark, "MATMUL_INT8", operation)
    status, results = run_benchmark(tmp_path / "x.json", "--only", "int8")
    assert status == 1
    right, row = results["rows"]
    assert (right["backend"], right["exact"], right["of_bf16"]) == ("int8 xla", True, None)
    assert (row["backend"], row["exact"], row["ms"]) == ("int8 wrong", False, None)
    out, err = capsys.readouterr()
    assert re.search(r"int8 wrong +WRONG *\n", out)
    assert err == "error: not timed, since wrong or failed: tiny int8 wrong\n"


def test_several_names_may_be_asked_for(tiny_shapes, tmp_path):
    _, results = run_benchmark(tmp_path / "x.json", "--only", "int8", "branch")
    names = [row["backend"] for row in results["rows"]]
    assert names == ["int8 xla", "g16 stretched branch xla"]
    assert results["rows"][1]["of_int8"] is not None


def test_a_seed_is_fresh_recorded_and_repeats_the_inputs(tiny_shapes, tmp_path, monkeypatch):
    assert benchmark.parse([]).seed != benchmark.parse([]).seed
    seen, make = [], benchmark.make_operands

    def kept(*args):
        operands = make(*args)
        seen.append(operands[0].values.tolist())
        return operands

    monkeypatch.setattr(benchmark, "make_operands", kept)
    for seed in (3, 3, 4):
        argv = ("--only", "bfloat16", "--seed", str(seed))
        assert run_benchmark(tmp_path / "x.json", *argv)[1]["seed"] == seed
    assert seen[:2] == seen[2:4] != seen[4:]


def test_results_hold_versions_and_the_commit(tiny_shapes, tmp_path, monkeypatch):
    results = run_benchmark(tmp_path / "x.json", "--only", "bfloat16")[1]
    assert {"date", "command", "commit", "environment", "seed"} <= set(results)
    assert {"python", "jax", "jaxlib"} <= set(results["environment"]["versions"])
    assert results["commit"] == provenance.commit()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", results["commit"] or "0" * 40)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit.__wrapped__() is None


@pytest.fixture
def tunable(monkeypatch):
    """tune.py with one small kernel that runs here: XLA's, with a "config" that may break it."""
    kernel = MATMUL_INT8.backend("xla")

    @dataclasses.dataclass(frozen=True)
    class Config:
        off: float

    def run(*args, config):
        return kernel.run(*args) * (1 + config.off)

    configs = {"values": (0.0,)}
    search = run, tune._int8, lambda m: map(Config, configs["values"])
    monkeypatch.setattr(tune, "SEARCHES", {"xla_int8": search})
    monkeypatch.setattr(tune, "SHAPES", {"tiny": Shape(m=4, n=48, k=64)})
    monkeypatch.setattr(benchmark, "SETS_BYTES", 1)
    monkeypatch.setattr(tune.timing, "measure", lambda *_, batches: [1e-3] * batches)
    return configs


def test_a_search_keeps_other_shapes_and_what_it_found(tunable, tmp_path, capsys):
    path = tmp_path / "table.json"
    other = {"kernel": "xla_int8", "m": 1, "n": 2, "k": 3, "best": {}}
    path.write_text(json.dumps({"entries": [other]}))
    assert tune.main(["--out", str(path), "--seed", "7"]) == 0
    table = json.loads(path.read_text())
    assert table["entries"][0] == other
    found = table["entries"][1]
    assert (found["m"], found["n"], found["k"], found["seed"]) == (4, 48, 64, 7)
    assert found["best"] == {"off": 0.0}
    assert {"device", "versions", "commit", "date"} <= set(table)
    assert "1000.0 us {'off': 0.0}" in capsys.readouterr().out


def test_a_wrong_quantize_backend_is_reported_and_not_timed(tiny_shapes, monkeypatch, capsys):
    reference = QUANTIZE.backend("reference")

    def run(x, **settings):
        return jax.tree.map(lambda a: a + 1, reference.run(x, **settings))

    wrong = dataclasses.replace(reference, name="wrong", run=run)
    operation = dataclasses.replace(QUANTIZE, backends=(wrong,))
    monkeypatch.setattr(benchmark, "QUANTIZE", operation)
    assert benchmark.main(["--only", "wrong"]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"quantize 4x64 absmax +wrong +WRONG *\n", out)
    assert err.startswith("error: not timed, since wrong or failed: quantize 4x64 absmax wrong; ")


def test_a_wrong_configuration_is_reported_and_not_timed(tunable, tmp_path, capsys):
    tunable["values"] = (1.0, 0.0)
    assert tune.main(["--out", str(tmp_path / "x.json")]) == 1
    (entry,) = json.loads((tmp_path / "x.json").read_text())["entries"]
    assert entry["best"] == {"off": 0.0}
    assert entry["times"][0] == {"config": {"off": 1.0}, "error": "differs from the reference"}
    assert "WRONG {'off': 1.0}" in capsys.readouterr().out


def test_a_search_without_a_result_writes_nothing(tunable, tmp_path):
    tunable["values"] = (1.0,)
    assert tune.main(["--out", str(tmp_path / "x.json")]) == 1
    assert not list(tmp_path.iterdir())


def test_a_step_s_figures_are_grouped_and_recorded(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(SIZES["transformer"], num_layers=0, num_single_layers=1)
    kernels = {"nvjet_x": 3e-3, "cudnn_sdpa": 2e-3, "my_gemm": 1e-3, "copy": 5e-4}
    kernels |= {"jit_qk_norm_rope__1": 1e-3, "matmul_mosaic_gpu_kernel": 1e-3}
    kernels |= {"attention_mosaic_gpu_kernel": 1e-3, "dequantize__1": 5e-4}
    small = dataclasses.replace(FLUX, sizes={"flux1-dev": SIZES | {"transformer": config}})
    monkeypatch.setattr(benchmark_model, "MODELS", {"flux1-dev": small})
    monkeypatch.setattr(benchmark_model.timing, "kernel_times", lambda *_: kernels)
    # Zeros are quick to compile.
    monkeypatch.setattr(benchmark_model, "random_normal", lambda _, shape, __: jnp.zeros(shape))
    argv = ["--recipes", "bf16", "--size", "16x16", "--text-tokens", "4", "--steps", "1"]
    argv += ["--batch", "2"]
    benchmark_model.main([*argv, "--seed", "5", "--out", str(tmp_path / "x.json")])
    record = json.loads((tmp_path / "x.json").read_text())
    assert (record["seed"], set(record["environment"])) == (5, {"device", "versions"})
    result = record["results"]["bf16"]
    assert result["groups_ms"] == {
        "matmuls": 5.0,
        "attention": 3.0,
        "norms and rotations of q and k": 1.0,
        "decoding": 0.5,
        "the rest": 0.5,
    }
    assert result["weight_bytes"] < result["peak_bytes"] < 3 * result["weight_bytes"]
    assert result["kernels_ms"] == pytest.approx(sum(result["groups_ms"].values()))
    out = capsys.readouterr().out
    assert f"step {result['queued_ms']:7.2f} ms" in out
    assert record["batch"] == 2
    assert result["gaps_ms"] == result["queued_ms"] - result["kernels_ms"]
    assert f"gaps {result['gaps_ms']:5.2f} ms" in out
    assert re.search(r"matmuls +5.00 ms +50%", out)


def test_a_synthetic_model_is_written_and_replaced_only_on_request(tmp_path, capsys, monkeypatch):
    schnell = dataclasses.replace(SIZES["transformer"], guidance_embeds=False)
    small = dataclasses.replace(FLUX, sizes={"flux1-schnell": SIZES | {"transformer": schnell}})
    monkeypatch.setattr(make_synthetic, "MODELS", {"flux1-schnell": small})
    argv = ["--out", str(tmp_path / "x"), "--model", "flux1-schnell"]
    make_synthetic.main(argv)
    config = json.loads((tmp_path / "x" / "transformer" / "config.json").read_text())
    assert config["guidance_embeds"] is False
    assert re.search(r"x: 0\.\d\d GB\n", capsys.readouterr().out)
    assert cli.run(make_synthetic.main, argv) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.run(make_synthetic.main, [*argv, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        ("benchmark", ["--batches", "0"], "--batches: invalid positive value: '0'"),
        ("benchmark", ["--shapes", "x"], "--shapes: invalid choice: 'x'"),
        ("benchmark", ["--seed", "-1"], "--seed: -1 is outside 0 to 4294967295"),
        (
            "benchmark",
            ["--only", "x3"],
            "--only 'x3' is in no name of what runs here: bfloat",
        ),
        ("benchmark", ["--only", "triton"], "--only 'triton' is in no name of what runs here: "),
        ("tune", ["--shapes", "flux-adaln"], "triton_few_rows: needs an NVIDIA GPU from Ampere on"),
        ("tune", ["--kernels", "x"], "--kernels: invalid choice: 'x'"),
        ("aot_report", ["--groups", "7"], "--groups: invalid choice: 7"),
        ("aot_report", ["--groups", "0"], "--groups: invalid choice: 0"),
        ("aot_report", ["--chips", "v4"], "--chips: invalid choice: 'v4'"),
        ("benchmark_model", ["--size", "100x64"], "width is 100"),
        ("benchmark_model", ["--steps", "0"], "--steps: invalid positive value: '0'"),
        ("benchmark_model", ["--recipes", "x"], "unknown recipe 'x'"),
        ("make_synthetic", [], "arguments are required: --out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, script, argv, said):
    argv = [*argv, "--out", str(tmp_path / "x")] if argv else []
    assert cli.run(MAINS[script], argv) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", MAINS)
def test_an_output_that_can_t_be_made_is_refused_before_any_work(tmp_path, capsys, script):
    (tmp_path / "file").write_text("")
    assert cli.run(MAINS[script], ["--out", str(tmp_path / "file" / "x")]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "can't be written" in err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{}]}'])
def test_a_file_that_is_no_table_of_sizes_is_kept(tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert cli.run(tune.main, ["--out", str(tmp_path / "x.json")]) == 2
    assert "holds no table of sizes; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "x.json").read_text() == text


def test_a_report_without_the_compiler_says_so(capsys, monkeypatch):
    monkeypatch.setattr(aot_report.compat, "libtpu_why_not", lambda: "libtpu isn't installed")
    assert cli.run(aot_report.main, []) == 2
    assert capsys.readouterr().err == "error: no TPU compiler: libtpu isn't installed\n"
