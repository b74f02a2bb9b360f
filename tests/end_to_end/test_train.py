"""Training with Ray Data, Ray Train and DeepSpeed equals a plain torch loop, and equals itself after a resume.

Most tests use one training run, `trained_run`, which lost a worker and was resumed.
"""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import export
from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import build_catalog
from ray_platform.train.checkpoint_format import read_weights
from ray_platform.train.heldout import read_heldout
from tests.support.training import assert_close_losses, diffdis_run, logged_losses, logged_metric, plain_loop

pytestmark = pytest.mark.usefixtures("ray_cluster")


def with_fields(run, **train):
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **train))


@pytest.fixture(scope="module")
def expected(trained_run):
    """Return (losses, keys) of the plain loop over the steps of `trained_run`."""
    return plain_loop(trained_run.plain)


def test_losses_follow_the_plain_loop_through_a_kill_and_a_resume(trained_run, expected):
    """Uses two workers with ZeRO 3."""
    assert_close_losses(logged_losses(trained_run.output), expected[0])


def test_every_sample_is_trained_on_exactly_once_per_epoch(trained_run, expected):
    assert trained_run.records.trained_on() == expected[1]
    assert (trained_run.output / "killed").exists()
    assert re.match(r"rank 1 \([\w.-]+, pid \d+\): killed \(SIGKILL\)", trained_run.failure)
    assert str(trained_run.output / "failures.log") in trained_run.failure
    assert "connection error" in (trained_run.output / "failures.log").read_text()
    assert trained_run.records.count() > len(expected[1]), "the killed worker's steps since the last checkpoint are done again"


def test_steps_that_are_done_again_have_the_same_losses_to_the_last_bit(trained_run):
    losses = logged_metric(trained_run.output, "train/loss_generation")
    assert len(losses) > 12
    assert len(set(losses)) == 12


def test_an_existing_run_is_not_overwritten(trained_run):
    with pytest.raises(ConfigError, match="already holds a run"):
        with_fields(trained_run.plain, resume="none").check()


def test_a_complete_run_is_left_alone(trained_run, capsys):
    def times():
        return {path: path.stat().st_mtime_ns for path in trained_run.output.rglob("*") if path.is_file()}

    before = times()
    assert trained_run.run.fit() == trained_run.tracked
    assert capsys.readouterr().out.startswith("output_dir: ")
    assert times() == before


def test_a_checkpoint_exports_as_the_run_itself_did(trained_run, tmp_path):
    def exported(folder, **fields):
        line = export(ExportConfig(str(trained_run.output), str(folder), **fields))
        return line, {part: load_file(folder / part) for part in parts}

    parts = ("unet/diffusion_pytorch_model.safetensors", "alignment/model.safetensors")
    line, ema = exported(tmp_path / "ema")
    assert "EMA" in line
    assert "step 12" in line
    for part, tensors in ema.items():
        expected = load_file(trained_run.output / "export" / part)
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    _, weights = exported(tmp_path / "weights", weights="weights")
    assert not torch.equal(weights[parts[1]]["head.query_out.weight"], ema[parts[1]]["head.query_out.weight"])
    (image,) = DiffDisPipeline.from_pretrained(tmp_path / "ema").generate(["red heart"], num_inference_steps=2)
    assert image.size == (16, 16)


@pytest.mark.slow
def test_the_exported_model_has_the_scores_that_were_logged_with_the_ema(tiny_model, training_shards, tmp_path):
    heldout = {"heldout_sources": (str(training_shards),), "heldout_samples": 10, "heldout_every": 12}
    run = diffdis_run(tiny_model, training_shards, tmp_path, num_workers=1, num_steps=12, zero_stage=0, ema_decay=0.5, **heldout)
    run.fit()
    model, objective, _ = run.build_task.args
    task = DiffDisTask(dataclasses.replace(model, warm_start=str(tmp_path / "export")), objective)
    samples = read_heldout(build_catalog(run.data), run.data, run.train.heldout_samples)
    with torch.no_grad():
        scores = task.score(task.embed_heldout(task.inputs(samples, torch.device("cpu"))))
    assert {name: logged_metric(tmp_path, name)[-1] for name in scores} == {name: (12, value) for name, value in scores.items()}


@pytest.mark.slow
def test_a_run_that_was_never_disturbed_has_the_same_losses_to_the_last_bit(trained_run, tmp_path):
    """Uses two launches, the first of which stops at a given step."""
    run = dataclasses.replace(trained_run.plain, output_dir=str(tmp_path))
    for last_step in (10, 12):
        with_fields(run, stop_at_step=last_step).fit()
        assert json.loads((tmp_path / "train_summary.json").read_text())["num_steps"] == last_step
    assert logged_losses(tmp_path) == logged_losses(trained_run.output)


@pytest.mark.slow
def test_a_new_run_starts_from_the_weights_of_a_checkpoint(trained_run, tmp_path):
    checkpoint = next((trained_run.output / "checkpoints").glob("*/step_00000012"))
    fields = {"resume": str(checkpoint), "resume_weights_only": True, "num_steps": 2, "seed": 1, "zero_stage": 2}
    dataclasses.replace(with_fields(trained_run.plain, **fields), output_dir=str(tmp_path)).fit()
    assert sorted(logged_losses(tmp_path)) == [1, 2]
    saved = next((tmp_path / "checkpoints").glob("*/step_00000002"))
    step = dict(read_weights(str(saved), "step"))
    assert {int(value) for name, value in step.items() if name.endswith("query_out.weight")} == {2}


@pytest.mark.slow
def test_a_run_resumes_from_any_checkpoint_in_a_new_folder(trained_run, tmp_path):
    """Step 9 of 12 is inside a shard of the second epoch."""
    checkpoint = next((trained_run.output / "checkpoints").glob("*/step_00000009"))
    dataclasses.replace(with_fields(trained_run.plain, resume=str(checkpoint)), output_dir=str(tmp_path)).fit()
    resumed = logged_losses(tmp_path)
    assert sorted(resumed) == [10, 11, 12]
    assert resumed == {step: values for step, values in logged_losses(trained_run.output).items() if step > 9}
