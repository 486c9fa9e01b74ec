"""What training refuses before any work, and the shapes of its losses (traced, not run)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_tiny_flux
from flax import nnx

from models import training as loop
from models.tiny_flux import architecture, training
from quartz_jax.cli import arguments as cli


@pytest.fixture
def photos(tmp_path):
    """Folder that looks like one of photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "classes.json").write_text('[{"name": "Goldfish"}]')
    (folder / "train_0.npz").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("stages", "more", "words"),
    [
        (["vae"], [], "--work is missing"),
        (["flow", "export"], ["--work", "WORK"], "--out is missing"),
        (["flow", "distill"], ["--work", "WORK", "--minutes", "7"], "each of flow, distill"),
        (["flow"], ["--work", "WORK", "--batch-size", "0"], "--batch-size"),
        # of no training at all, an untrained model would be exported
        (["flow"], ["--work", "WORK", "--minutes", "0"], "0 is no finite number above 0"),
        (["flow"], ["--work", "WORK", "--minutes", "nan"], "nan is no finite number above 0"),
        (["flow"], ["--work", "WORK", "--minutes=-1"], "-1 is no finite number above 0"),
        (["flow"], ["--work", "WORK", "--stop-after", "nan"], "nan is no finite number above 0"),
        (["flow"], ["--work", "WORK", "--caption-dropout", "1"], "1 is outside 0 to below 1"),
        (["flow"], ["--work", "WORK", "--caption-dropout", "nan"], "nan is outside 0 to below 1"),
        (["export", "flow"], ["--work", "WORK", "--out", "WORK"], "run flow export"),
        (["vae", "vae"], ["--work", "WORK"], "run vae"),
        (["flux"], ["--work", "WORK"], "invalid choice: 'flux'"),
    ],
)
def test_bad_arguments_give_one_line_before_any_work(photos, tmp_path, capsys, stages, more, words):
    more = [str(tmp_path / "work") if x == "WORK" else x for x in more]
    assert cli.run(train_tiny_flux.main, [*stages, "--data", str(photos), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("missing", ["classes.json", "train_0.npz", ""])
def test_data_that_is_not_there_is_named(photos, tmp_path, capsys, missing):
    data = photos if missing else tmp_path / "absent.npz"
    (photos / (missing or "train_0.npz")).unlink()
    argv = ["vae", "--data", str(data), "--work", str(tmp_path / "work")]
    assert cli.run(train_tiny_flux.main, argv) == 2
    error = capsys.readouterr().err
    assert str(data) in error and error.count("\n") == 1


def test_export_before_training_is_refused(tmp_path):
    assert not loop.has_state(tmp_path / "flow")
    with pytest.raises(ValueError, match="train that stage first"):
        loop.restore_ema(tmp_path / "flow", {"w": jnp.zeros(1)})
    assert not (tmp_path / "flow").exists()


def stage_of_one_weight(folder, **changes):
    """Train a stage in the place of a real one, perhaps not to its end."""
    config = loop.TrainingConfig(steps=2, minutes=1, batch_size=1, learning_rate=0.1, scan=1)

    def loss(params, frozen, data, key):
        return (params["w"] - 1) ** 2

    loop.train("test", config, loss, {"w": jnp.zeros(())}, {}, folder, **changes)


@pytest.mark.parametrize(
    ("stages", "stopped"),
    [(["export"], "vae"), (["export"], "flow"), (["export"], "distill"), (["distill"], "flow")],
)
def test_a_stage_that_was_stopped_is_neither_exported_nor_built_on(
    tmp_path, photos, capsys, stages, stopped
):
    for stage in ("vae", "flow", "distill"):
        stage_of_one_weight(tmp_path / stage, stop_after=0 if stage == stopped else float("inf"))
    argv = [*stages, "--data", str(photos), "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.run(train_tiny_flux.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / stopped} holds a stage that isn't" in error
    assert not (tmp_path / "out").exists()


def test_without_distillation_the_model_samples_with_true_guidance():
    plain = train_tiny_flux.model_index(64, train_tiny_flux.FLOW_GUIDANCE)["_generation_defaults"]
    assert (plain["guidance_scale"], plain["true_cfg_scale"]) == (1.0, 3.0)
    distilled = train_tiny_flux.model_index(64, {})["_generation_defaults"]
    assert distilled["guidance_scale"] > 1 and "true_cfg_scale" not in distilled
    assert distilled["width"] == distilled["height"] == 64


@pytest.mark.parametrize("stage", ["flow", "distill"])
def test_token_sequences_of_two_lengths_train_together(stage):
    config = architecture.transformer_config(2)
    model = nnx.eval_shape(
        lambda: architecture.TextToImage(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    graphdef, params = nnx.split(model)
    rows = {"latents": np.zeros((3, 16, config.in_channels), np.float32)}
    rows |= {"t5": np.zeros((3, 2, 16), np.int32), "clip": np.zeros((3, 2, 32), np.int32)}
    data = {"rows": rows, "empty_t5": rows["t5"][:1, 0], "empty_clip": rows["clip"][:1, 0]}
    losses = {"flow": training.flow_loss(graphdef, 2, 0.1)}
    losses["distill"] = training.guidance_loss(graphdef, 2)
    loss = jax.eval_shape(losses[stage], params, params, data, jax.random.key(0))
    assert loss.shape == () and loss.dtype == jnp.float32
