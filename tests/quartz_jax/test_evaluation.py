import numpy as np
import pytest
from flax import nnx

from quartz_jax import get_recipe, observe, place, quantize_model
from quartz_jax.evaluation import results as evaluation
from quartz_jax.evaluation.photos import read_photos

CLASSES = ["bear", "brown bear", "Goldfish"]


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


class Small(nnx.Module):
    """Two linears."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(32, 48, rngs=rngs), nnx.Linear(48, 16, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("bf16", "executed (bf16)"),
        ("w4a8x", "executed (int8)"),
        ("nvfp4", "executed (bf16)"),
        ("int4-g64", "simulated"),
        ("w4a16", "executed (weight-only)"),
    ],
)
def test_rows_say_whether_they_are_executed(recipe, words):
    _, report = quantize_model(Small(), get_recipe(recipe))
    assert evaluation.runs(report) == words


def test_the_sqnr_of_a_placed_layer_is_that_of_its_outputs():
    model = Small()
    samples = [{"x": np.random.default_rng(i).normal(size=(8, 32)).astype("f")} for i in (0, 1)]
    seen = observe(model, samples)
    quantized, _ = place(quantize_model(model, get_recipe("w8a8"))[0])
    found = evaluation.layer_sqnr(model, quantized, seen)
    x = np.concatenate([sample["x"] for sample in samples])
    exact, got = (np.asarray(m.first(x), np.float64) for m in (model, quantized))
    expected = 10 * np.log10((exact**2).sum() / ((got - exact) ** 2).sum())
    assert set(found) == {"first", "second"}
    # the reference's weights are rounded to bfloat16, an error 30 dB below that of 8 bits
    assert found["first"] == pytest.approx(expected, abs=0.5)


def test_photos_of_a_broken_file_are_refused(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no usable images"):
        read_photos(tmp_path / "x.npz", 3)
