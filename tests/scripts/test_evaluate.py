import contextlib
import json
import shutil

import evaluate
import numpy as np
import pytest
import report

from quartz_jax.cli import arguments as cli

METHODS = "bf16,w4a4,gptq+int4-g64"


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


def scores(out, recipe):
    return json.loads(out.read_text())["recipes"][recipe]["scores"]["psnr"]


def test_the_table_has_a_row_a_recipe_and_the_results_one_score_an_image(evaluated):
    out, lines = evaluated / "out.json", (evaluated / "printed.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["recipe", "---", "w8a8", "int4"]
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
def test_results_of_other_settings_are_not_mixed_in(argv, out, capsys):
    before = out.read_text()
    assert cli.run(evaluate.main, [*argv, "--seed0", "1"]) == 2
    assert "made with other settings; use another --out" in capsys.readouterr().err
    assert out.read_text() == before


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("evaluate.py", "--prompts", tmp_path / "absent.txt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent.txt" in done.stderr


def with_recipes(argv, recipes, *more):
    at = argv.index("--recipes") + 1
    return [*argv[:at], recipes, *argv[at + 1 :], *more]


def test_recipes_and_methods_run_side_by_side_with_errors_by_layer_and_step(compared):
    results = json.loads(compared.read_text())["recipes"]
    assert list(results) == METHODS.split(",")
    for name in ("w4a4", "gptq+int4-g64"):
        entry = results[name]
        assert len(entry["sigmas"]) == len(entry["velocity"]) == 1  # one step
        assert 0 < entry["velocity"][0][0] < 1
        assert set(entry["sqnr"]) == {layer["path"] for layer in entry["report"]["layers"]}
        assert all(5 < figure < 60 for figure in entry["sqnr"].values())
    assert results["bf16"]["summary"]["psnr"]["mean"] == 100


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


def test_a_report_of_nothing_is_refused(evaluated, tmp_path, capsys):
    results = str(evaluated / "out.json")
    code = cli.run(report.main, ["--results", results, "--out", str(tmp_path / "r.html")])
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
    monkeypatch.setattr(evaluate, "__file__", "no_such_script.py")
    assert cli.run(evaluate.main, with_recipes(argv, "bf16,w8a8", "--jobs", "2")) == 2
    assert "says why" in capsys.readouterr().err
    assert "no_such_script.py" in out.with_suffix(".shard0.log").read_text()


def test_a_shard_without_the_common_results_is_refused(argv, out, capsys):
    assert cli.run(evaluate.main, [*argv, "--shard", "0/2"]) == 2
    assert "give --jobs and no --shard" in capsys.readouterr().err
    assert not out.exists()
