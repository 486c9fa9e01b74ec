"""Results files, classes and images that aren't what evaluate writes: one line that says where."""

import copy
import json
import math

import numpy as np
import pytest

from quartz_jax import get_recipe
from quartz_jax.evaluation.judges import Judges
from quartz_jax.evaluation.pages.comparison import compare
from quartz_jax.evaluation.prompts import Prompts
from quartz_jax.evaluation.results import ImageStore, is_of, read_results

INTERVAL = {"mean": 1.0, "low": 0.5, "high": 2.0}
SUMMARY = {"weight_bits": 4.5, "activation_bits": 8.0, "runs": "executed", "psnr": INTERVAL}
ENTRY = {
    "scores": {"psnr": [1.0, 2]},
    "summary": SUMMARY,
    "sigmas": [1.0, 0.5],
    "velocity": [[0.1], [0.2]],
    "sqnr": {"layer": 20.0},
}
BF16 = {"scores": {"psnr": [100.0, 100.0]}, "summary": SUMMARY | {"weight_bits": 16.0}}
RESULTS = {
    "date": "2026-11-28T00:00:00",
    "command": ["quartz", "evaluate"],
    "settings": {"model": "m", "prompts": ["a", "b"]},
    "environment": {"device": "cpu", "versions": {"jax": "1"}},
    "recipes": {"bf16": BF16, "w4a8x": ENTRY},
}


def changed(path, value):
    """Return the results with the value at a path of keys replaced."""
    results = at = copy.deepcopy(RESULTS)
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return results


def test_results_are_read_as_they_are(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULTS))
    assert read_results(tmp_path / "x.json") == RESULTS


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ([], "holds no results of evaluate"),
        ({"recipes": [], "settings": {}, "environment": {}}, "missing fields"),
        (changed(["recipes"], ["a", "b"]), "holds no results of evaluate"),
        (changed(["settings"], 3), "holds no results of evaluate"),
        (changed(["settings", "prompts"], "ab"), "prompts is 'ab'; it must be a list"),
        (changed(["settings", "prompts"], ["a"]), "recipes.bf16: scores must have"),
        (changed(["environment", "versions"], []), "versions is"),
        (changed(["command"], None), "command is None"),
        (changed(["command"], []), "prompts and command must not be empty"),
        (changed(["settings", "prompts"], []), "prompts and command must not be empty"),
        (changed(["recipes", "w4a8x", "scores", "psnr"], [1.0, math.nan]), "must be finite"),
        (changed(["recipes", "w4a8x"], None), "recipes.w4a8x is None"),
        (changed(["recipes", "w4a8x", "scores"], {"psnr": "12"}), "scores.psnr is '12'"),
        (changed(["recipes", "w4a8x", "scores", "ssim"], [1.0]), "as many figures of each"),
        (changed(["recipes", "w4a8x", "scores", "ssim"], [1.0, 2.0]), "summary.ssim must be"),
        (changed(["recipes", "w4a8x", "scores"], {}), "scores must have psnr"),
        (changed(["recipes", "w4a8x", "summary", "psnr"], 3.0), "psnr must be a interval"),
        (changed(["recipes", "w4a8x", "summary", "weight_bits"], None), "weight_bits must be"),
        (changed(["recipes", "w4a8x", "velocity"], [[1.0]]), "a row for each of sigmas"),
        (changed(["recipes", "w4a8x", "velocity"], [[1.0], []]), "all of one length"),
        (changed(["recipes", "w4a8x", "sqnr"], {"layer": "x"}), "sqnr.layer is 'x'"),
    ],
)
def test_odd_results_are_refused_by_field(tmp_path, results, line):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=line) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_rows_whose_images_are_not_all_measured_are_left_out(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["recipes"]["other"] = {"scores": {"psnr": [1.0]}, "summary": SUMMARY}
    assert compare(results, tmp_path).ranked == ["w4a8x"]


def test_rows_are_ranked_by_a_figure_that_all_have(tmp_path):
    results = copy.deepcopy(RESULTS)
    results["recipes"]["w4a8x"]["scores"] = {"psnr": [1.0, 2.0], "ssim": [1.0, 2.0]}
    assert compare(results, tmp_path).metric == "ssim"
    results["recipes"]["other"] = {"scores": {"psnr": [1.0, 2.0]}, "summary": SUMMARY}
    assert compare(results, tmp_path).metric == "psnr"


@pytest.mark.parametrize("stored", [b"", b"nothing", None, np.zeros((2, 4, 4, 3), np.float32)])
def test_a_file_without_images_is_named(tmp_path, stored):
    path = tmp_path / "000000.npy"
    if isinstance(stored, bytes):
        path.write_bytes(stored)
    else:
        np.save(path, np.array([{}]) if stored is None else stored, allow_pickle=True)
    with pytest.raises(ValueError, match=r"000000\.npy holds"):
        ImageStore(tmp_path).load(1)


def judges(tmp_path, **given):
    nothing = dict.fromkeys(("real", "inception", "clip", "lpips", "classes"))
    prompts = Prompts(texts=["a fox"], images=None)
    options = nothing | {"networks": tmp_path / "none", "real_count": 4} | given
    return Judges(prompts, lambda name: tmp_path / name, **options)


@pytest.mark.parametrize(
    ("classes", "line"),
    [
        ([{"name": "fox"}], r"classes\.json\[0\] has missing fields: in1k"),
        ([{"name": "fox", "in1k": 1000}], "it must be 0 to 999"),
        ([{"name": " ", "in1k": 1}], "name is ' '"),
        ([{"name": "fox", "in1k": "3"}], "in1k is '3'; it must be a whole number"),
        ([{"name": "cat", "in1k": 3}], "'a fox' names no class"),
        ({"fox": 3}, "must be a JSON list of classes"),
        ([], "must be a JSON list of classes"),
        ([3], r"classes\.json\[0\] is 3; it must be a JSON object"),
    ],
)
def test_classes_that_are_none_are_refused(tmp_path, classes, line):
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    with pytest.raises(ValueError, match=line):
        judges(tmp_path, classes=tmp_path / "classes.json")


def test_classes_without_the_network_that_sees_them_are_refused(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps([{"name": "fox", "in1k": 277, "wnid": "n02119022"}]))
    with pytest.raises(ValueError, match=r"holds none; make them with scripts/convert_metric"):
        judges(tmp_path, classes=path)


def test_networks_of_other_weights_are_refused(tmp_path):
    from safetensors.numpy import save_file

    from quartz_jax.evaluation.metrics_jax import FILES

    for name in FILES.values():
        save_file({"x": np.zeros(3, np.float32)}, tmp_path / name)
    with pytest.raises(ValueError, match="holds other networks than those needed"):
        judges(tmp_path, networks=tmp_path)


def test_an_entry_of_a_recipe_without_later_fields_is_kept():
    """It would be thrown away, and measured anew, whenever recipes get a field."""
    now = get_recipe("rotate16+gptq+quartz/int8").to_json()
    before = json.loads(json.dumps(now))
    for rule in before["rules"]:
        del rule["layer"]["wide"]
        for step in rule["layer"]["transforms"]:
            step.pop("fold")
    assert before != now
    assert is_of({"recipe": before, "scores": 1}, {"recipe": now})
    other = get_recipe("fold16+gptq+quartz/int8").to_json() | {"name": now["name"]}
    assert not is_of({"recipe": other}, {"recipe": now})
    assert not is_of({"recipe": None}, {"recipe": now})
    assert not is_of({"recipe": before}, {"recipe": now, "simulated": True})
