"""Small training runs for tests: their data, `Run` objects, logged metrics, and a plain torch loop to compare with."""

import functools
import io
import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

import diffdis.task
from diffdis.config import ObjectiveConfig
from diffdis.encoder import describe_encoders
from diffdis.objective import StepNoise
from diffdis.task import DiffDisTask
from ray_platform.contracts import TrainingError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run
from ray_platform.train.optimizer import learning_rate_factor
from ray_platform.train.worker import step_seed
from tests.ray_platform.small_task import PixelTask
from tests.support.recording import Records, recording

ROOT = Path(__file__).parents[2]
WORDS = ("red", "green", "blue", "heart", "circle", "star", "cat", "tree")
# For fp32. Ranks sum in a different order than one process, and Adam's first steps divide small numbers by small ones.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


def write_shards(folder, num_shards=4, samples_per_shard=12):
    """Write LAION-style tars of 20 px images with repeated captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(samples_per_shard):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, format="PNG")
                caption = " ".join(rng.choice(WORDS, 2))
                tar.write({"__key__": f"{shard:05d}{i:04d}", "png": buffer.getvalue(), "txt": caption.encode()})
    return folder


def diffdis_run(model, sources, output_dir, objective=None, **train) -> Run:
    """Return a run of the tiny model with two workers; `objective` and `train` override fields."""
    objective = ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, **(objective or {}))
    fields = {
        "num_workers": 2, "num_steps": 6, "micro_batch_size": 4, "warmup_steps": 2, "log_every": 1, "preview_every": 0,
        "cpus_per_worker": 0.5, "max_failures": 0,
    }  # fmt: skip
    config = TrainConfig(**(fields | train))
    return Run(
        functools.partial(DiffDisTask, model, objective, ("red heart",)),
        DataConfig(sources=(str(sources),), image_size=model.image_size),
        config,
        TrackingConfig(),
        str(output_dir),
        {"recipe": "test", "model": asdict(model), "objective": asdict(objective), "train": asdict(config)},
        functools.partial(describe_encoders, model),
    )


def pixel_run(output, sources, output_dir=None, tracking=None, **train) -> Run:
    """Return a run of a Task unrelated to DiffDis, whose ranks record the samples they train on in `output`/records."""
    fields = {
        "num_workers": 2, "num_steps": 80, "micro_batch_size": 4, "warmup_steps": 2, "log_every": 1, "preview_every": 0,
        "cpus_per_worker": 0.5, "checkpoint_every": 20, "zero_stage": 2, "ema_decay": 0.9,
    }  # fmt: skip
    return Run(
        functools.partial(recording, str(output / "records"), PixelTask),
        DataConfig(sources=(str(sources),), image_size=16),
        TrainConfig(**(fields | train)),
        tracking or TrackingConfig(),
        output_dir or str(output),
        {"recipe": "test"},
        dict,
    )


def records(output, run=None):
    return Records(output / "records", num_steps=run.train.num_steps if run else 0)


def wait_for_steps(output, number):
    deadline = time.monotonic() + 400
    while (done := records(output).count()) < number:
        assert time.monotonic() < deadline, f"{done} steps in 400 s"
        time.sleep(0.05)


def at_step(output, number, action):
    """Call `action` in a thread once the ranks have recorded `number` steps."""

    def wait():
        wait_for_steps(output, number)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def killed_once(marker, rank, at_call, build_task, *arguments):
    """Build a Task with `build_task`; the process of `rank` kills itself once, at its training step number `at_call`."""
    task = build_task(*arguments)
    prepare, calls = task.precompute_step_loss, 0

    def counted(*step):
        nonlocal calls
        calls += 1
        if calls == at_call and torch.distributed.get_rank() == rank and not Path(marker).exists():
            Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(*step)

    task.precompute_step_loss = counted
    return task


def with_short_previews(build_task, *arguments):
    """Build a Task with `build_task` whose previews take two steps of sampling. Under ZeRO 3, 20 take a rank eight seconds."""
    diffdis.task.PREVIEW_STEPS = 2
    return build_task(*arguments)


def plain_loop(run):
    """Train on the same batches in one process, with AdamW and explicit clipping: no Ray, DeepSpeed or process group.

    Returns:
        {step: (loss_generation, loss_alignment)}, and {(step from 0, rank): keys of its samples}.
    """
    config = run.train
    torch.manual_seed(config.seed)
    task = run.build_task()
    module = task.module
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, 0.999))
    rates = [group["lr"] for group in optimizer.param_groups]
    catalog = build_catalog(run.data)
    nothing = Ledger(catalog.num_units)
    readers = [Reader(config.seed, rank, config.num_workers, nothing, nothing) for rank in range(config.num_workers)]
    size = {"batch_size": config.micro_batch_size, "num_batches": config.num_steps}
    streams = [stream(catalog, run.data, reader, **size) for reader in readers]
    losses, keys = {}, {}
    for step, batches in enumerate(zip(*streams, strict=True)):
        keys |= {(step, rank): list(batch.keys) for rank, batch in enumerate(batches)}
        inputs = [task.inputs(batch, torch.device("cpu")) for batch in batches]
        samples = [module.sample_noise(part, step_seed(config.seed, step, rank, 0)) for rank, part in enumerate(inputs)]
        noise = StepNoise(*(torch.cat(values) for values in zip(*samples, strict=True)))
        whole = {name: torch.cat([i[name] for i in inputs]) for name in inputs[0]} | {"null_states": inputs[0]["null_states"]}
        module.sample_noise = lambda *_, noise=noise: noise
        loss, metrics = module(whole, 0)
        losses[step + 1] = tuple((metrics[n][0] / metrics[n][1]).item() for n in ("loss_generation", "loss_alignment"))
        del module.sample_noise
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_factor(config, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)
        optimizer.step()
    return losses, keys


def logged_metric(output_dir, name):
    """Return [(step, value)] of a run's metric in MLflow, in the order of logging."""
    from mlflow import MlflowClient

    tracked = json.loads((Path(output_dir) / "mlflow.json").read_text())
    history = MlflowClient(tracked["tracking_uri"]).get_metric_history(tracked["run_id"], name)
    return [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: metric.timestamp)]


def logged_losses(output_dir):
    """Return {step: (loss_generation, loss_alignment)}, with the later values of a repeated step."""
    generation, alignment = (dict(logged_metric(output_dir, f"train/loss_{name}")) for name in ("generation", "alignment"))
    return {step: (generation[step], alignment[step]) for step in sorted(generation)}


def assert_close_losses(ours, expected):
    assert ours.keys() == expected.keys()
    for step, values in expected.items():
        torch.testing.assert_close(ours[step], values, **TOLERANCE, msg=lambda m, s=step: f"step {s}: {m}")


@dataclass
class TrainedRun:
    """A training run that many tests share.

    It has two workers, ZeRO 3, EMA and 12 steps. Rank 1 is killed in its 9th step, which ends the first launch; the second launch
    resumes. MLflow tracks it with previews, system metrics and the model.
    """

    run: Run
    plain: Run  # the same run without recording and without the kill
    output: Path
    tracked: dict[str, str]
    failure: str  # last line of the first launch

    @property
    def records(self) -> Records:
        return records(self.output, self.run)


def train_once(model, sources, output) -> TrainedRun:
    """Execute the shared training run. Needs a Ray cluster with at least two CPUs."""
    from diffdis_platform.config.pretrain import model_package

    fields = {"zero_stage": 3, "ema_decay": 0.5, "num_steps": 12, "checkpoint_every": 3, "preview_every": 12}
    plain = diffdis_run(model, sources, output, resume="auto", **fields)
    recorded = functools.partial(recording, str(output / "records"), with_short_previews, plain.build_task)
    run = replace(
        plain,
        build_task=functools.partial(killed_once, str(output / "killed"), 1, 9, recorded),
        tracking=TrackingConfig(registered_model="tiny", tags={"team": "vision"}, system_metrics_seconds=1.0),
        package=model_package("joint"),
        command="python jobs/pretrain.py --tracking.uri http://someone:secret@mlflow.example",
    )
    try:
        run.fit()
    except TrainingError as error:
        return TrainedRun(run, plain, output, run.fit(), str(error))
    raise AssertionError("the first launch should have lost a worker")
