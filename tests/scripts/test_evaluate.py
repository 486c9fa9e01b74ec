import contextlib
import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from quartz_jax import get_recipe
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import evaluate, report
from quartz_jax.evaluation import bench, shards
from quartz_jax.evaluation import results as results_
from quartz_jax.evaluation.pages import comparison
from quartz_jax.io.files import locked

METHODS = "bf16,w4a4,gptq+int4-g64"
MARKUP = "a dog <b onclick='x'>&amp;</b>"


def command_line(tiny, folder, recipes="w8a8,int4"):
    (folder / "prompts.txt").write_text("a cat\n\na dog\n")
    options = {"model": tiny, "prompts": folder / "prompts.txt", "out": folder / "out.json"}
    options |= {"networks": folder / "none", "calibration-prompts": folder / "prompts.txt"}
    options |= {"count": 2, "batch": 1, "steps": 1, "size": "32x32", "recipes": recipes}
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)]


@pytest.fixture
def argv(tiny, tmp_path):
    return command_line(tiny, tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """Folder of a run of two recipes, what it printed in printed.txt."""
    folder = tmp_path_factory.mktemp("evaluated")
    with (folder / "printed.txt").open("w") as file, contextlib.redirect_stdout(file):
        evaluate.main(command_line(tiny, folder))
    return folder


@pytest.fixture(scope="module")
def compared(tiny, tmp_path_factory):
    """Results file of a run of recipes and methods."""
    folder = tmp_path_factory.mktemp("compared")
    evaluate.main(command_line(tiny, folder, METHODS))
    return folder / "out.json"


@pytest.fixture
def done(evaluated, tmp_path):
    """Put a copy of the run of two recipes where `argv` has its files."""
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)


def with_recipes(argv, recipes, *more):
    at = argv.index("--recipes") + 1
    return [*argv[:at], recipes, *argv[at + 1 :], *more]


def scores(out, recipe):
    return json.loads(out.read_text())["recipes"][recipe]["scores"]["psnr"]


def test_the_table_has_a_row_a_recipe_and_the_results_one_score_an_image(evaluated):
    out, lines = evaluated / "out.json", (evaluated / "printed.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["recipe", "---", "bf16", "w8a8", "int4"]
    assert len(scores(out, "w8a8")) == len(scores(out, "int4")) == 2
    assert min(scores(out, "w8a8")) > max(scores(out, "int4"))


def test_results_hold_device_versions_date_and_command(evaluated):
    results = json.loads((evaluated / "out.json").read_text())
    assert {"date", "command", "settings", "environment"} <= set(results)
    assert {"device", "versions"} == set(results["environment"])


@pytest.mark.usefixtures("done")
def test_an_interrupted_run_goes_on_where_it_stopped(argv, out):
    results = json.loads(out.read_text())
    whole = scores(out, "int4")
    kept = results["recipes"]["int4"]["scores"]
    results["recipes"]["int4"]["scores"] = {"psnr": [1.0], "ssim": kept["ssim"][:1]}
    out.write_text(json.dumps(results))
    evaluate.main(argv)
    assert scores(out, "int4") == [1.0, whole[1]]


@pytest.mark.usefixtures("done")
def test_a_recipe_whose_rules_changed_starts_again(argv, out):
    results = json.loads(out.read_text())
    results["recipes"]["int4"] |= {"recipe": {}, "scores": {"psnr": [1.0], "ssim": [1.0]}}
    out.write_text(json.dumps(results))
    evaluate.main(argv)
    assert 1.0 not in scores(out, "int4")


@pytest.mark.usefixtures("done")
@pytest.mark.parametrize("other", [("--seed0", "1"), ("--batch", "2"), ("--true-cfg", "2")])
def test_results_of_other_settings_are_not_mixed_in(argv, out, capsys, other):
    before = out.read_text()
    assert cli.run(evaluate.main, [*argv, *other]) == 2
    assert "made with other settings; use another --out" in capsys.readouterr().err
    assert out.read_text() == before


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("evaluate.py", "--prompts", tmp_path / "absent.txt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent.txt" in done.stderr


def test_recipes_and_methods_run_side_by_side_with_errors_by_layer_and_step(compared):
    results = json.loads(compared.read_text())["recipes"]
    assert list(results) == METHODS.split(",")
    words = {name: entry["summary"]["runs"] for name, entry in results.items()}
    assert words == {
        "bf16": "executed (bf16)",
        "w4a4": "executed (int8)",
        "gptq+int4-g64": "simulated",
    }
    for name in ("w4a4", "gptq+int4-g64"):
        entry = results[name]
        assert len(entry["sigmas"]) == len(entry["velocity"]) == 1  # one step
        assert 0 < entry["velocity"][0][0] < 1
        assert set(entry["sqnr"]) == {layer["path"] for layer in entry["report"]["layers"]}
        assert all(5 < figure < 60 for figure in entry["sqnr"].values())
    assert results["bf16"]["summary"]["psnr"]["mean"] == 100


def test_a_recipe_can_stand_beside_its_simulation():
    rows = bench.open_rows("bf16,w4a8x,int4", simulated=True)
    assert [row.name for row in rows] == [
        "bf16", "w4a8x", "int4", "w4a8x (simulated)", "int4 (simulated)",
    ]  # fmt: skip
    assert rows[1].identity != rows[3].identity


def test_a_recipe_of_attention_alone_is_measured_and_not_taken_for_the_16_bit_model(
    argv, out, tmp_path
):
    """Its images were those of the 16-bit model, and its PSNR that of equal ones, 100."""
    recipe = dataclasses.replace(get_recipe("bf16"), name="attention8", attention="int8_fp8")
    (tmp_path / "attention8.json").write_text(json.dumps(recipe.to_json()))
    evaluate.main(with_recipes(argv, str(tmp_path / "attention8.json")))
    entry = json.loads(out.read_text())["recipes"]["attention8"]
    assert "in 8 bits it needs a Hopper GPU" in entry["placement"]  # asked for, and not there
    assert "sqnr" not in entry["summary"]
    assert entry["velocity"]


def test_calibration_prompts_change_what_is_measured(argv, out, tmp_path):
    (tmp_path / "other.txt").write_text("a purple submarine\n")
    found = []
    for name in ("prompts.txt", "other.txt"):
        path = tmp_path / f"{name}.json"
        more = ("--calibration-prompts", str(tmp_path / name), "--out", str(path))
        evaluate.main(with_recipes(argv, "gptq+int4-g64", *more))
        found.append(scores(path, "gptq+int4-g64"))
    assert found[0] != found[1]


def test_a_run_that_is_out_of_time_goes_on_later(argv, out, capsys):
    evaluate.main(with_recipes(argv, "w8a8", "--minutes", "1e-9"))
    assert "the same command goes on" in capsys.readouterr().out
    evaluate.main(with_recipes(argv, "w8a8"))
    assert len(scores(out, "w8a8")) == 2


def test_images_are_kept_for_the_report(evaluated):
    files = sorted((evaluated / "out.images").glob("w8a8/*.npy"))
    assert [np.load(file).shape for file in files] == [(1, 32, 32, 3)] * 2


def test_the_report_is_one_file_with_every_method(compared, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    report.main(["--results", str(compared), "--out", str(page), "--note", "a <note>"])
    html = page.read_text()
    assert "a &lt;note&gt;" in html
    for name in METHODS.split(","):
        assert name in html
    assert html.count("data:image/webp") >= 3 * 3 + 2 * 3 * 5  # a wall of three, five a case
    assert html.count("<svg") == 3
    assert not any(word in html for word in ("<script", 'src="http', "src='http", "<link"))


@pytest.fixture
def made(compared):
    """What the page is made from."""
    return comparison.compare(json.loads(compared.read_text()), compared.with_suffix(".images"))


def test_the_report_leads_with_six_columns_and_folds_the_rest(made):
    assert made.lead == ["bf16", "w4a4"]
    assert made.rest == ["gptq+int4-g64"]
    several = dict.fromkeys((*comparison.LEAD, "int4"), made.done["w4a4"])
    more = dataclasses.replace(made, done=several, ranked=[x for x in several if x != "bf16"])
    assert (tuple(more.lead), more.rest) == (comparison.LEAD, ["int4"])
    side = comparison._side_by_side(made)
    assert "<th>bf16</th><th>w4a4</th></tr>" in side
    assert "<td>executed (bf16)</td><td>executed (int8)</td>" in side
    wall, _, folded = comparison._same_prompts(made).partition("<details>")
    assert ("w4a4" in wall, "gptq" in wall, "gptq" in folded) == (True, False, True)


def test_no_two_rows_share_a_colour_and_more_rows_change_none():
    names = [*comparison.LEAD, *(f"method{i}" for i in range(200))]
    found = comparison.colours(names)
    drawn = [found[name] for name in names if name != "bf16"]
    tableau = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "17becf")
    drawn += [f"#{colour}" for colour in tableau]  # which matplotlib's C0 and such are
    assert len(set(drawn)) == len(drawn)
    fewer = comparison.colours(names[:50])
    assert fewer.items() <= found.items()


def test_a_row_has_one_colour_in_every_figure(made):
    colors = pytest.importorskip("matplotlib.colors")
    assert made.colours["w4a4"] == comparison.colours([])["w4a4"]
    drawn = colors.to_hex(made.colours["w4a4"])
    assert drawn in comparison._by_layer_and_step(made) and drawn in comparison._scatter(made)
    other = made.colours["gptq+int4-g64"]
    assert other in comparison._scatter(made) and other not in comparison.colours([]).values()


def test_a_prompt_with_markup_is_shown_as_text(made):
    texts = [MARKUP] * len(made.prompts)
    marked = dataclasses.replace(made, prompts=texts)
    html = comparison._same_prompts(marked) + comparison._cases(marked)
    assert "&lt;b onclick=" in html
    assert "<b onclick" not in html


def test_a_checkpoint_is_one_more_row(quantized, evaluated, argv, out, tmp_path):
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)
    more = ("--checkpoint", str(quantized))
    evaluate.main(with_recipes(argv, "w8a8", *more))
    entry = json.loads(out.read_text())["recipes"]["w4a8x (checkpoint)"]
    assert entry["summary"]["runs"] == "executed (int8)"
    assert "int8, as stored" in entry["placement"] or "int8, xla" in entry["placement"]
    assert 15 < entry["summary"]["psnr"]["mean"] < 60
    assert len(entry["sqnr"]) == len(entry["report"]["layers"])


def test_a_checkpoint_s_figures_are_those_of_its_recipe(quantized, evaluated, argv, out, tmp_path):
    shutil.copytree(evaluated, tmp_path, dirs_exist_ok=True)
    evaluate.main(with_recipes(argv, "w4a8x", "--checkpoint", str(quantized)))
    assert scores(out, "w4a8x (checkpoint)") == scores(out, "w4a8x")


def test_an_evaluation_into_results_of_a_running_one_is_refused(argv, out, capsys):
    with locked(out.with_name(".out.json.lock"), out):
        assert cli.run(evaluate.main, argv) == 2
    assert "another process is writing" in capsys.readouterr().err


@pytest.mark.usefixtures("done")
def test_results_of_another_autoencoder_are_not_mixed_in(argv, tiny, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model" / tiny.name)
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.5}))
    at = argv.index("--model") + 1
    assert cli.run(evaluate.main, [*argv[:at], str(model), *argv[at + 1 :]]) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc", "a b", "c:d"])
def test_names_of_rows_are_no_paths(name):
    safe = results_.folder_name(name)
    assert "/" not in safe
    assert not safe.startswith(".")
    assert safe != name


def test_statistics_that_are_there_are_taken_and_others_are_made(argv, out, monkeypatch):
    evaluate.main(with_recipes(argv, "gptq+int4"))
    file = out.with_suffix(".calibration.npz")
    before = file.stat().st_mtime_ns
    evaluate.main(with_recipes(argv, "gptq+int4-g64"))
    assert file.stat().st_mtime_ns == before
    evaluate.main(with_recipes(argv, "smooth+int4"))
    assert file.stat().st_mtime_ns != before


@pytest.mark.parametrize("only", ["bf16", "w8a8"])
def test_a_report_of_nothing_is_refused(evaluated, tmp_path, capsys, only):
    results = json.loads((evaluated / "out.json").read_text())
    results["recipes"] = {only: results["recipes"][only]}
    (tmp_path / "out.json").write_text(json.dumps(results))
    argv = ["--results", str(tmp_path / "out.json"), "--out", str(tmp_path / "r.html")]
    code = cli.run(report.main, argv)
    assert (code, (tmp_path / "r.html").exists()) == (2, False)
    assert "needs bf16" in capsys.readouterr().err


def test_processes_that_share_the_recipes_find_what_one_does(compared, argv, tmp_path):
    one = json.loads(compared.read_text())["recipes"]
    path = tmp_path / "spread.json"
    evaluate.main(with_recipes(argv, METHODS, "--out", str(path), "--jobs", "2"))
    several = json.loads(path.read_text())["recipes"]
    assert set(several) == set(one)
    for name, entry in one.items():
        np.testing.assert_allclose(several[name]["scores"]["psnr"], entry["scores"]["psnr"], 1e-5)
    assert list(tmp_path.glob("spread.shard*")) == []


def test_what_processes_found_before_they_were_stopped_is_taken_in(argv, out):
    evaluate.main(with_recipes(argv, "bf16,w8a8"))
    results = json.loads(out.read_text())
    entry = results["recipes"].pop("w8a8")
    entry["scores"]["psnr"] = [1.0, 2.0]
    shard = results | {"recipes": {"w8a8": entry}}
    out.write_text(json.dumps(results))
    out.with_suffix(".shard0.json").write_text(json.dumps(shard))
    evaluate.main(with_recipes(argv, "bf16,w8a8", "--jobs", "2"))
    assert scores(out, "w8a8") == [1.0, 2.0]


def test_a_process_that_fails_is_said_and_its_log_is_kept(argv, out, capsys, monkeypatch):
    evaluate.main(with_recipes(argv, "bf16"))
    monkeypatch.setattr(shards, "COMMAND", (sys.executable, "no_such_script.py"))
    assert cli.run(evaluate.main, with_recipes(argv, "bf16,w8a8", "--jobs", "2")) == 2
    assert "says why" in capsys.readouterr().err
    assert "no_such_script.py" in out.with_suffix(".shard0.log").read_text()


def test_a_shard_without_the_common_results_is_refused(argv, out, capsys):
    assert cli.run(evaluate.main, [*argv, "--shard", "0/2"]) == 2
    assert "give --jobs and no --shard" in capsys.readouterr().err
    assert not out.exists()
