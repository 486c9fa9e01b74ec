"""evaluate.py with the published protocol: MJHQ-30K's files, FID, CLIP score and LPIPS."""

import importlib.util
import json

import numpy as np
import published_files
import pytest

from quartz_jax.cli import arguments as cli
from quartz_jax.cli import evaluate
from quartz_jax.evaluation import metrics_torch as published

PROMPTS = ["a cat", "a dog", "a red car"]


def options(**given):
    """Return a command line."""
    return [str(x) for name, value in given.items() for x in (f"--{name}", value)]


@pytest.mark.parametrize("flag", ["inception", "clip", "lpips"])
def test_the_extra_is_asked_for_before_any_work(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    argv = options(out=tmp_path / "out.json", **{flag: tmp_path / "x"})
    assert cli.run(evaluate.main, argv) == 2
    assert "run: pip install -e '.[published]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_real_images_without_inception_is_refused(tmp_path, capsys):
    assert cli.run(evaluate.main, options(out=tmp_path / "out.json", real=tmp_path)) == 2
    assert "is for FID; give --inception too" in capsys.readouterr().err


needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is None, reason="the extra published isn't installed"
)


@pytest.fixture(scope="module")
def argv(small, tmp_path_factory):
    """A command line with all of the protocol."""
    published.import_libraries()
    folder = tmp_path_factory.mktemp("published")
    given = {"model": small, "prompts": published_files.save_mjhq(folder / "mjhq", PROMPTS)}
    given |= {"real": folder / "mjhq", "out": folder / "out.json", "networks": folder / "none"}
    given |= {"count": 3, "batch": 3, "steps": 1, "size": "32x32", "recipes": "bf16,int4"}
    given["inception"] = published_files.save_inception(folder / "inception.pth")
    given["clip"] = published_files.save_clip(folder / "clip")
    given["lpips"] = published_files.save_alexnet(folder / "alexnet.pth")
    return options(**given)


@pytest.fixture(scope="module")
def run(argv):
    """Run the command and return what it finds; with Inception's first 64 features, for time."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(published, "_LAYER", "64")
            evaluate.main(argv)
        return json.loads(out.read_text())

    out = evaluate.parse(argv).out
    run.out = out
    return run


@pytest.fixture(scope="module")
def results(run):
    return run()


@needs_extra
def test_every_image_has_its_figures_with_an_interval_and_fid_is_one(results):
    entry = results["recipes"]["int4"]
    for name in ("lpips", "clip"):
        assert len(entry["scores"][name]) == 3
        assert set(entry["summary"][name]) == {"mean", "low", "high"}
    assert isinstance(entry["summary"]["fid"], float)
    assert min(entry["scores"]["lpips"]) > 0
    assert results["settings"]["prompts"] == PROMPTS
    assert set(results["settings"]) > {"inception", "clip", "lpips"}


@needs_extra
def test_the_16_bit_model_has_no_distance_to_itself(results):
    entry = results["recipes"]["bf16"]
    assert entry["scores"]["lpips"] == [0, 0, 0]
    assert "fid" in entry["summary"]
    assert "fid_to_bf16" not in entry["summary"]


def fid(x, y):
    """FID by another way: the trace of a root of a product is a nuclear norm."""
    a, b = ((f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (x, y))
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    mean = np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2)
    return mean + np.sum(a**2) + np.sum(b**2) - 2 * root


@needs_extra
def test_fid_is_that_of_the_images_that_were_kept(run, argv, results):
    stored = np.load(next(run.out.with_suffix(".images").glob("int4/*.npy")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "_LAYER", "64")
        inception = published.open_networks(evaluate.parse(argv).inception, None, None).inception
    features = inception.features(stored).astype(np.float64)
    summary = results["recipes"]["int4"]["summary"]
    for name, other in (("fid", "real"), ("fid_to_bf16", "bf16")):
        others = np.load(run.out.with_suffix(f".{other}.npy")).astype(np.float64)
        assert len(others) == 3
        assert summary[name] == pytest.approx(fid(features, others), rel=1e-3, abs=1e-5)


@needs_extra
def test_the_table_has_a_column_each(run, results, capsys):
    run()
    header, _, bf16, int4 = capsys.readouterr().out.splitlines()
    assert "| LPIPS [95 %] | FID | FID to bf16 | CLIP score [95 %] |" in header
    assert [line.count("|") for line in (bf16, int4)] == [header.count("|")] * 2


@needs_extra
def test_an_interrupted_run_goes_on_to_the_same_figures(run, results):
    cut = json.loads(run.out.read_text())
    entry = cut["recipes"]["int4"]
    entry["scores"] = {name: values[:0] for name, values in entry["scores"].items()}
    del entry["summary"]
    run.out.write_text(json.dumps(cut))
    assert run()["recipes"]["int4"]["summary"] == results["recipes"]["int4"]["summary"]


@needs_extra
def test_the_report_s_table_has_the_columns(run, results, tmp_path):
    pytest.importorskip("matplotlib")
    from quartz_jax.cli import report

    report.main(["--results", str(run.out), "--out", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text()
    assert all(title in html for title in ("LPIPS to bf16", "FID to bf16", "CLIP score [95 %]"))
