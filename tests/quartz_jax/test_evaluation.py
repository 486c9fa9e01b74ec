import json

import numpy as np
import pytest

from quartz_jax import get_recipe
from quartz_jax.evaluation import results as evaluation
from quartz_jax.evaluation.photos import read_photos
from quartz_jax.methods import Method, get_method

CLASSES = [{"name": "bear"}, {"name": "brown bear"}, {"name": "Goldfish"}]


def test_prompts_take_the_longest_class_name_they_hold():
    prompts = ["a photo of a brown bear", "a goldfish", "the bear"]
    assert evaluation.class_of_prompts(prompts, CLASSES).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="'a tree' names no class"):
        evaluation.class_of_prompts(["a tree"], CLASSES)


def test_images_come_back_in_order_as_8_bit(tmp_path):
    store = evaluation.ImageStore(tmp_path / "x")
    images = np.random.default_rng(0).random((5, 4, 4, 3))
    store.put(0, images[:2])
    store.put(2, images[2:])
    assert (store.load(5) == np.round(images * 255)).all()
    with pytest.raises(ValueError, match="lacks images"):
        store.load(6)
    store.put(0, images[:1])
    assert len(store.load(1)) == 1


def test_names_and_files_of_either_kind_resolve(tmp_path):
    assert evaluation.resolve("w4a4") == get_recipe("w4a4")
    assert evaluation.resolve("gptq+nvfp4") == get_method("gptq+nvfp4")
    for recipe in (get_recipe("w4a4"), get_method("svdquant+quartz")):
        path = tmp_path / "r.json"
        path.write_text(json.dumps(recipe.to_json()))
        found = evaluation.resolve(str(path))
        assert (type(found), found) == (type(recipe), recipe)
    assert isinstance(found, Method)
    with pytest.raises(ValueError, match="can't be read"):
        evaluation.resolve(str(tmp_path / "absent.json"))


def test_photos_of_a_broken_file_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no usable images"):
        read_photos(tmp_path / "x.npz", 3)
