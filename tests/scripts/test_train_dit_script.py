"""The training of tiny-dit, on a smaller one: stopped, resumed, exported, drawn, judged."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny_dit
from flax import nnx
from PIL import Image

from models import load_pipeline
from models import training as loop
from models.dit.config import DiTConfig
from models.dit.family import DIT
from models.photos import read_photos
from models.synthetic import write_random_model
from models.tiny_dit import architecture
from models.vae.config import AutoencoderKLConfig
from models.vae.params import AUTOENCODER_KL
from quartz_jax.cli import arguments as cli
from quartz_jax.cli import evaluate

CLASSES = ("goldfish", "koala", "teapot", "pig")
SIDE = 16  # pixels


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder of a few photos of each class, each class of one colour."""
    folder = tmp_path_factory.mktemp("photos")
    entries = [{"name": name, "in1k": i, "synonyms": [name]} for i, name in enumerate(CLASSES)]
    (folder / "classes.json").write_text(json.dumps(entries))
    for name in ("train_0.npz", "train_1.npz", "val.npz"):
        labels = np.arange(8) % len(CLASSES)
        files = [_png(60 * int(label) + 20) for label in labels]
        offsets = np.cumsum([0, *map(len, files)], dtype=np.int64)
        blob = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / name, blob=blob, off=offsets, label=labels.astype(np.int16))
    return folder


def _png(value):
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (value, value, 255 - value)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Folder of a small autoencoder that halves the sides twice."""
    folder = tmp_path_factory.mktemp("vae")
    config = AutoencoderKLConfig(
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.25,
    )
    AUTOENCODER_KL.export(AUTOENCODER_KL.module(config, rngs=nnx.Rngs(0)), folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    """Make the transformer small, and its steps large."""

    def config(latent_channels, classes, side):
        return DiTConfig(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=latent_channels,
            out_channels=2 * latent_channels,
            num_layers=2,
            sample_size=side,
            num_embeds_ada_norm=classes,
        )

    quick = loop.TrainingConfig(
        steps=60, minutes=60, batch_size=8, learning_rate=1e-2, warmup=1, ema_decay=0.9
    )
    monkeypatch.setattr(architecture, "transformer_config", config)
    monkeypatch.setattr(train_tiny_dit, "TRAINING", quick)


def test_training_is_stopped_resumed_exported_and_draws(photos, vae, tmp_path, capsys, small):
    out, keep = tmp_path / "out", tmp_path / "keep"
    common = ["--data", str(photos), "--classes", "4", "--vae", str(vae)]
    common += ["--work", str(tmp_path / "work"), "--keep", str(keep), "--out", str(out)]
    assert not cli.run(train_tiny_dit.main, ["train", "export", *common, "--stop-after", "1e-9"])
    assert "isn't finished" in capsys.readouterr().out and not out.exists()
    kept = train_tiny_dit.TRANSFORMER.load(keep, dtype=jnp.float32)
    assert np.abs(kept.final_layer.linear.bias[...]).max() > 0  # zero before the first step
    assert cli.run(train_tiny_dit.main, ["export", *common]) == 2
    assert "isn't finished" in capsys.readouterr().err and not out.exists()

    assert not cli.run(train_tiny_dit.main, ["train", "export", *common])
    log = (out / "training" / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in log]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["loss"] < rows[0]["loss"]

    pipeline = load_pipeline(out, dtype=jnp.float32)
    assert pipeline.family.name == "DiT" and pipeline.only_size == (SIDE, SIDE)
    assert (out / "prompts.txt").read_text().split() != list(CLASSES)
    assert sorted((out / "prompts.txt").read_text().split()) == sorted(CLASSES)
    options = {"num_inference_steps": 2, "output_type": "np", "progress": False}
    named, numbered = (pipeline(x, **options) for x in (["koala", "pig"], ["1", "3"]))
    np.testing.assert_array_equal(named, numbered)
    assert named.shape == (2, SIDE, SIDE, 3) and not np.array_equal(*named)


def test_images_are_judged_by_their_classes(photos, tmp_path, capsys, monkeypatch):
    def features(weights, images):  # a classifier by colour, in the place of EfficientNet
        value = images[:, 0, 0, 0] * (1 if images.dtype == np.uint8 else 255)
        logits = np.zeros((len(images), 1000))
        logits[np.arange(len(images)), np.round((value - 20) / 60).astype(int)] = 1
        logits[:, 500] = 2  # no class of these photos
        return logits[:, :4], logits

    def draw(pipeline, labels, guidance, steps):  # each class but the last as it should be
        right = np.where(labels == 3, 0, labels)
        return np.tile(((60 * right + 20) / 255)[:, None, None, None], (1, SIDE, SIDE, 3))

    monkeypatch.setattr(train_tiny_dit.metrics_jax, "load_network", lambda *_: {})
    monkeypatch.setattr(train_tiny_dit.metrics_jax, "features", features)
    monkeypatch.setattr(train_tiny_dit, "load_pipeline", lambda *_, **__: None)
    monkeypatch.setattr(train_tiny_dit, "draw", draw)
    argv = ["judge", "--data", str(photos), "--classes", "4", "--out", str(tmp_path)]
    assert not cli.run(train_tiny_dit.main, [*argv, "--count", "8", "--guidance", "1", "3"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["guidance"] for row in rows] == [1, 3]
    assert [row["agreement"]["mean"] for row in rows] == [0.75, 0.75]
    assert json.loads((tmp_path / "training" / "judged.json").read_text())["rows"] == rows


def test_training_begins_with_given_weights(photos, vae, tmp_path, capsys, small):
    def run(work, *more):
        argv = ["train", "--data", str(photos), "--classes", "4", "--vae", str(vae)]
        argv += ["--work", str(tmp_path / work), "--steps", "2", *more]
        assert not cli.run(train_tiny_dit.main, argv)
        return json.loads((tmp_path / work / "train" / "log.jsonl").read_text())["loss"]

    folder = tmp_path / "weights"
    config = architecture.transformer_config(2, 4, SIDE // 4)
    module = train_tiny_dit.TRANSFORMER.module(config, rngs=nnx.Rngs(0))
    module.final_layer.linear.bias[...] += 3.0
    train_tiny_dit.TRANSFORMER.export(module, folder)
    assert run("given", "--start", str(folder)) > 3 + run("fresh")

    wider = dataclasses.replace(config, num_embeds_ada_norm=5)
    module = train_tiny_dit.TRANSFORMER.module(wider, rngs=nnx.Rngs(0))
    train_tiny_dit.TRANSFORMER.export(module, folder)
    argv = ["train", "--data", str(photos), "--classes", "4", "--vae", str(vae)]
    argv += ["--work", str(tmp_path / "other"), "--start", str(folder)]
    assert cli.run(train_tiny_dit.main, argv) == 2
    assert "of other sizes" in capsys.readouterr().err


def test_latents_lie_as_diffusers_pipeline_decodes_them(photos, vae):
    args = train_tiny_dit.parse(
        ["train", "--data", str(photos), "--classes", "4", "--vae", str(vae), "--work", "w"]
    )
    data = train_tiny_dit.training_data(args)
    latents, half = data["latents"], len(data["latents"]) // 2
    assert latents.shape == (32, 2, 4, 4) and latents.dtype == jnp.bfloat16
    np.testing.assert_array_equal(data["labels"][:half], data["labels"][half:])
    module = AUTOENCODER_KL.load(vae, dtype=jnp.float32)
    images = read_photos(photos, 4).images.astype(np.float32) / 127.5 - 1
    mean = jax.jit(lambda x: module.encode(x)[0])(images)
    wanted = np.asarray(mean.transpose(0, 3, 1, 2)) * 1.5
    np.testing.assert_allclose(latents[:half].astype(np.float32), wanted, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], "--work is missing"),
        (["export", "--work", "WORK"], "--out is missing"),
        (["judge"], "--out is missing"),
        (["export", "train", "--work", "WORK"], "run train export"),
        (["train", "--work", "WORK", "--classes", "5"], "--classes is 5"),
        (["train", "--work", "WORK", "--classes", "0"], "--classes"),
        (["train", "--work", "WORK", "--class-dropout", "1"], "1 is outside 0 to below 1"),
        (["train", "--work", "WORK", "--start", "nowhere"], "--start nowhere is no folder"),
        (["train", "--work", "WORK", "--keep", __file__], "can't be written"),
        (["train", "judge", "--work", "WORK", "--out", "o", "--networks", "nowhere"], "nowhere"),
        (["train", "--work", "WORK", "--minutes", "nan"], "nan is no finite number above 0"),
    ],
)
def test_bad_arguments_give_one_line_before_any_work(photos, tmp_path, capsys, argv, words):
    argv = [str(tmp_path / "work") if x == "WORK" else x for x in argv]
    more = [] if "--classes" in argv else ["--classes", "4"]
    assert cli.run(train_tiny_dit.main, [*argv, "--data", str(photos), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_fewer_classes_are_spread_over_all(photos):
    found = read_photos(photos, 2)
    assert [entry["name"] for entry in found.classes] == ["goldfish", "teapot"]
    whole = read_photos(photos)
    kept = np.isin(whole.labels, [0, 2])
    np.testing.assert_array_equal(found.images, whole.images[kept])
    np.testing.assert_array_equal(found.labels, whole.labels[kept] // 2)


def test_files_without_a_chosen_class_are_passed_over(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    with np.load(photos / "train_0.npz") as file:
        held = dict(file)
    np.savez(tmp_path / "photos" / "train_2.npz", **held | {"label": np.full(8, 1, np.int16)})
    found, expected = read_photos(tmp_path / "photos", 2), read_photos(photos, 2)
    np.testing.assert_array_equal(found.images, expected.images)
    with pytest.raises(ValueError, match=r"train_2.npz holds no photo of the 2 classes"):
        read_photos(tmp_path / "photos", 2, "train_2.npz")


@pytest.mark.parametrize("name", ["train_0.npz", "classes.json"])
def test_a_damaged_file_of_photos_is_named(photos, tmp_path, name):
    shutil.copytree(photos, tmp_path / "photos")
    file = tmp_path / "photos" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=name):
        read_photos(tmp_path / "photos")


def test_a_model_of_classes_is_evaluated_on_its_own_prompts(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out.json"
    config = DiTConfig(num_attention_heads=2, attention_head_dim=16, num_layers=1, out_channels=8)
    config = dataclasses.replace(config, sample_size=SIDE // 4, num_embeds_ada_norm=len(CLASSES))
    small_vae = AutoencoderKLConfig(block_out_channels=(8, 8, 8), norm_num_groups=4)
    sizes = {"vae": small_vae, "transformer": config}
    write_random_model(model, DIT, sizes, schedule="dit")
    index = architecture.model_index([{"name": name} for name in CLASSES], SIDE)
    loop.write_json(model / "model_index.json", index)
    (model / "prompts.txt").write_text("\n".join(CLASSES))
    argv = ["--model", str(model), "--recipes", "gptq+int8", "--count", "2", "--batch", "2"]
    argv += ["--steps", "1", "--networks", str(tmp_path / "none"), "--out", str(out)]
    evaluate.main(argv)
    results = json.loads(out.read_text())
    assert results["settings"]["prompts"] == list(CLASSES[:2])
    assert results["settings"]["calibration_prompts"][:3] == ["0", "2", "0"]
    assert set(results["recipes"]) == {"bf16", "gptq+int8"}
    scores = results["recipes"]["gptq+int8"]["scores"]["psnr"]
    assert all(20 < score < 99 for score in scores)  # near the original, and not it
