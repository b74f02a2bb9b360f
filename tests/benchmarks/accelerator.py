"""Measure a model of Stable Diffusion's size on one accelerator and compare with the predictions of `diffdis sizing`.

    PYTHONPATH=platform:. python tests/benchmarks/accelerator.py [--only 512 256] [--smoke]

Runs the training engine under DeepSpeed in a bare loop, without Ray, on precomputed inputs in memory: the recipe sd_v1_laion
with random weights, one setting after another, each in a separate process. Times are medians over synchronized steps.
The last line is one JSON object; its field `sizing` is a value for `diffdis sizing --constants`. `--smoke` uses a tiny model and
also runs on a CPU.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffdis.task import DiffDisTask
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import PREVIEW_CAPTIONS
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion_joint_mask
from diffdis_platform.sizing.counts import Counts, clip_text_encoder, count, stable_diffusion_autoencoder
from diffdis_platform.sizing.estimate import memory
from ray_platform.contracts import Batch, one_line
from ray_platform.train.config import BatchPlan
from ray_platform.train.throughput import peak_flops
from tests.support.tiny_checkpoints import save_clip_tokenizer, save_stable_diffusion

WARM_UP, TIMED, BATCHES = 5, 15, 4  # steps, steps, distinct batches
PREVIEW_STEPS = 20  # sampling steps of DiffDisTask.preview


@dataclass(frozen=True)
class Setting:
    px: int = 512
    micro_batch: int = 16
    task: str = "joint"
    train: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig that override the recipe
    all: bool = False  # also measure encoding, copying a checkpoint, generating and embedding


SETTINGS = {
    "512": Setting(all=True),
    "256": Setting(256, 32, all=True),
    "512_generation": Setting(task="generation"),
    "512_alignment": Setting(task="alignment"),
    "512_channels_last": Setting(train={"channels_last": True}),
    "512_activation_checkpointing": Setting(train={"activation_checkpointing": True}),
    "512_batch_24": Setting(micro_batch=24),
    "512_fp16": Setting(train={"precision": "fp16"}),
    "512_zero_3": Setting(train={"zero_stage": 3}),
    "512_offload": Setting(train={"offload_optimizer": True}),
    "512_compile": Setting(train={"compile": True}),
}


def configuration(setting: Setting, folder: Path, smoke: bool) -> PretrainConfig:
    base = sd_v1_laion_joint_mask()
    px, micro_batch = (16, 4) if smoke else (setting.px, setting.micro_batch)
    unet = replace(base.model.unet, sample_size=px // 8)
    text = replace(base.model.text_encoder, path=str(folder))
    head = base.model.head
    if smoke:  # the layout of tests.support.tiny_checkpoints
        kinds = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
        unet = replace(unet, sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2)
        unet = replace(unet, down_block_types=kinds[0], up_block_types=kinds[1], norm_num_groups=8)
        text, head = replace(text, token_dim=32, embedding_dim=32), replace(head, num_layers=1, width=32, num_heads=2)
    model = replace(base.model, image_size=px, unet=unet, text_encoder=text, head=head)
    model = replace(model, autoencoder=replace(model.autoencoder, path=str(folder)))
    train = replace(base.train, num_workers=1, micro_batch_size=micro_batch, warmup_steps=1, **setting.train)
    if smoke and train.precision == "fp16" and not torch.cuda.is_available():
        train = replace(train, precision="bf16")
    return replace(base, model=model, train=train, objective=replace(base.objective, task=setting.task))


def save_encoders(folder: Path, smoke: bool) -> None:
    """Write vae/, text_encoder/ and tokenizer/ with random weights to a folder."""
    if smoke:
        save_stable_diffusion(folder)
        return
    stable_diffusion_autoencoder().save_pretrained(folder / "vae")
    special = save_clip_tokenizer(folder / "tokenizer")
    tokens = {"bos_token_id": special.bos_token_id, "eos_token_id": special.eos_token_id}
    clip_text_encoder(sd_v1_laion_joint_mask().model.text_encoder, **tokens).save_pretrained(folder / "text_encoder")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call, without the first, warm-up call."""
    found = []
    for _ in range(rounds + 1):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def measure(setting: Setting, config: PretrainConfig) -> dict[str, float]:
    """Measure one setting. Runs in a separate process."""
    from ray_platform.train.engine import Engine

    begin_alone()
    task = DiffDisTask(config.model, config.objective, PREVIEW_CAPTIONS)
    size = config.train.micro_batch_size
    engine = Engine(task, config.train, size, 1)
    rng, px = np.random.default_rng(0), config.model.image_size
    words = "".join(PREVIEW_CAPTIONS).replace(" ", "")
    pictures = [
        Batch(
            {"image": rng.integers(0, 256, (size, px, px, 3), dtype=np.uint8)},
            [" ".join(rng.choice(list(words), 8)) for _ in range(size)],
            [str(i) for i in range(size)],
            (),
            {},
        )
        for _ in range(BATCHES)
    ]
    inputs = [task.inputs(batch, engine.device) for batch in pictures]
    found = {}
    if setting.all:
        found["encode_seconds_a_sample"] = seconds(lambda: task.inputs(pictures[0], engine.device), 5) / size
    if engine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    number = iter(range(10**6))

    def step() -> None:
        seed = next(number)
        loss, _ = engine.backward([inputs[seed % BATCHES]], [seed])
        engine.update(seed)
        if config.train.precision != "fp16" and not torch.isfinite(loss):
            raise AssertionError(f"step {seed}: the loss is {float(loss)}")

    step()
    if config.train.compile:
        begun = time.perf_counter()
        task.compile()
        step()
        wait()
        found["compile_seconds"] = time.perf_counter() - begun
    for _ in range(WARM_UP):
        step()
    found["seconds_a_step"] = seconds(step, TIMED)
    if engine.device.type == "cuda":
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found | (extras(task, engine, inputs[0]) if setting.all else {})


def begin_alone() -> None:
    """Initialize a process group with this process as its only member."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def extras(task: DiffDisTask, engine: Any, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    from ray_platform.train.checkpoint_format import contiguous_on_cpu

    wait()
    begun = time.perf_counter()
    num_bytes = sum(contiguous_on_cpu(tensor).nbytes for _, tensor, _ in engine.local_state())
    copying = time.perf_counter() - begun
    with engine.inference():
        drawing = seconds(lambda: task.preview(0, 1), 1)
        embedding = seconds(lambda: task.embed_heldout(inputs), 3)
    return {
        "checkpoint_gb": num_bytes / 1e9,
        "checkpoint_copy_seconds": copying,
        "images_generated_per_second": len(PREVIEW_CAPTIONS) / drawing,
        "images_embedded_per_second": len(inputs["latent"]) / embedding,
    }


def with_predictions(found: dict[str, float], config: PretrainConfig, counts: Counts) -> dict[str, float]:
    """Return the measured values together with the values that sizing predicts and assumes."""
    size, step = config.train.micro_batch_size, found["seconds_a_step"]
    rate = size / step
    result = {"samples_per_second": rate, "tflops_per_second": rate * counts.executed_flops / 1e12} | found
    held = memory(counts, config.train, BatchPlan.of(size, 1, size), live=False)
    result |= {"memory_gb_predicted": held.total / 1e9, "parameter_tensors": counts.num_tensors}
    peak = peak_flops(torch.device("cuda")) if torch.cuda.is_available() else 0.0
    if peak:
        result["mfu"] = rate * counts.executed_flops / peak
    if peak and "encode_seconds_a_sample" in found:
        result["encoder_mfu"] = counts.encoders.flops / found["encode_seconds_a_sample"] / peak
    return {name: float(f"{value:.4g}") for name, value in result.items()}


def for_sizing(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return constants for sizing: `mfu` of the most GPU-bound setting, `issue_us` of the most host-bound (alignment only)."""
    whole, alone = results.get("512", {}), results.get("512_alignment", {})
    found = {"mfu": max((r.get("mfu", 0.0) for r in results.values()), default=0.0)}
    if "encoder_mfu" in whole:
        found["encoder_mfu"] = whole["encoder_mfu"]
        found["host_copy_gb_per_second"] = round(whole["checkpoint_gb"] / whole["checkpoint_copy_seconds"], 2)
    if "seconds_a_step" in alone:
        found["issue_us"] = round(1e6 * alone["seconds_a_step"] / alone["parameter_tensors"])
    return {name: value for name, value in found.items() if value}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_encoders(folder, arguments.smoke)
        for name in arguments.only:
            setting = SETTINGS[name]
            config = configuration(setting, folder, arguments.smoke)
            with multiprocessing.get_context("spawn").Pool(1) as process:
                measuring = process.apply_async(measure, (setting, config))
                counts = count(config)
                try:
                    results[name] = with_predictions(measuring.get(), config, counts)
                except (torch.OutOfMemoryError, RuntimeError) as error:  # keep the results of the other settings
                    results[name] = {"failed": one_line(error, 200)}
            print(name, json.dumps(results[name]), flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, "settings": results, "sizing": for_sizing(results)}))


if __name__ == "__main__":
    main()
