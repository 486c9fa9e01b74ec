"""The examples of docs/ and README run as they stand, each page in one namespace."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from models import load_pipeline
from models.flux.family import FLUX
from models.synthetic import write_random_model
from models.tiny_flux.architecture import FOLDER
from quartz_jax import get_recipe, quantize_model
from quartz_jax.conversion import checkpoint

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "models"))
from small_flux import SIZES  # noqa: E402 (its folder is added above)

# One of each block: what is tested is that the examples run.
ONE = {
    "transformer": dataclasses.replace(SIZES["transformer"], num_layers=1, num_single_layers=1),
    "text_encoder": dataclasses.replace(SIZES["text_encoder"], num_hidden_layers=1),
    "text_encoder_2": dataclasses.replace(SIZES["text_encoder_2"], num_layers=1),
    "vae": dataclasses.replace(SIZES["vae"], layers_per_block=1),
}

EXAMPLE = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^<!-- file: (\S+) -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = sorted((ROOT / "docs").glob("*.md"))

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def run_examples(page: Path) -> int:
    """Run a page's examples in its order, with its own line numbers; return their number."""
    text, names = page.read_text(), {"__name__": page.stem}
    examples = list(EXAMPLE.finditer(text))
    for found in examples:
        lines = text[: found.start(1)].count("\n")
        exec(compile("\n" * lines + found[1], page, "exec"), names)
    return len(examples)


@every_page
def test_the_examples_of_a_page_run(page):
    assert run_examples(page), "no example is marked to be run"


@every_page
def test_a_file_that_a_page_shows_is_the_file_as_it_stands(page):
    for found in FILE.finditer(page.read_text()):
        assert found[2] == (ROOT / found[1]).read_text(), found[1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    """In a folder where its MODEL and QUANTIZED are small models of FLUX.1's architecture."""
    model = tmp_path / "models" / "tiny_flux"
    write_random_model(model, FLUX, ONE, tokenizers=FOLDER)
    index = json.loads((model / "model_index.json").read_text())
    index["_generation_defaults"] = {"height": 32, "width": 32, "num_inference_steps": 1}
    (model / "model_index.json").write_text(json.dumps(index))
    recipe = get_recipe("w8a8")  # the quickest
    quantized, report = quantize_model(load_pipeline(model).transformer, recipe)
    folder = tmp_path / "QUANTIZED"
    checkpoint.save(folder, quantized, recipe=recipe, report=report, base=model)
    monkeypatch.chdir(tmp_path)
    assert run_examples(ROOT / "README.md") == 2
