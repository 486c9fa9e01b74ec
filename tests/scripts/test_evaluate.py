import json

import evaluate
import pytest

from quartz_jax import cli


@pytest.fixture
def argv(tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    options = {"model": tiny, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "out.json"}
    options |= {"count": 2, "batch": 1, "steps": 1, "size": "32x32", "recipes": "w8a8,int4"}
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.json"


def scores(out, recipe):
    return json.loads(out.read_text())["recipes"][recipe]["scores"]["psnr"]


def test_the_table_has_a_row_a_recipe_and_the_results_one_score_an_image(argv, out, capsys):
    evaluate.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["recipe", "---", "w8a8", "int4"]
    assert len(scores(out, "w8a8")) == len(scores(out, "int4")) == 2
    assert min(scores(out, "w8a8")) > max(scores(out, "int4"))


def test_results_hold_device_versions_date_and_command(argv, out):
    evaluate.main(argv)
    results = json.loads(out.read_text())
    assert {"date", "command", "settings", "environment"} <= set(results)
    assert {"device", "versions"} == set(results["environment"])


def test_an_interrupted_run_goes_on_where_it_stopped(argv, out):
    evaluate.main(argv)
    results = json.loads(out.read_text())
    whole = scores(out, "int4")
    kept = results["recipes"]["int4"]["scores"]
    results["recipes"]["int4"]["scores"] = {"psnr": [1.0], "ssim": kept["ssim"][:1]}
    out.write_text(json.dumps(results))
    evaluate.main(argv)
    assert scores(out, "int4") == [1.0, whole[1]]


def test_a_recipe_whose_rules_changed_starts_again(argv, out):
    evaluate.main(argv)
    results = json.loads(out.read_text())
    results["recipes"]["int4"] |= {"recipe": {}, "scores": {"psnr": [1.0], "ssim": [1.0]}}
    out.write_text(json.dumps(results))
    evaluate.main(argv)
    assert 1.0 not in scores(out, "int4")


def test_results_of_other_settings_are_not_mixed_in(argv, out, capsys):
    evaluate.main(argv)
    before = out.read_text()
    assert cli.run(evaluate.main, [*argv, "--seed0", "1"]) == 2
    assert "made with other settings; use another --out" in capsys.readouterr().err
    assert out.read_text() == before


def test_the_command_exits_with_2_and_one_line_on_bad_input(run_script, tmp_path):
    done = run_script("evaluate.py", "--prompts", tmp_path / "absent.txt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "absent.txt" in done.stderr
