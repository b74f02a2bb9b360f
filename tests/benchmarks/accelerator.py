"""Measure a model of Stable Diffusion's size on one accelerator and compare with the predictions of `diffdis sizing`.

    PYTHONPATH=platform:. python tests/benchmarks/accelerator.py [--budget 280] [--only 512 256] [--smoke]

First single kernels, then the training engine in a bare loop, without Ray, on precomputed inputs in memory: sd_v1_laion
with random weights, and changes to it, the most informative first. Times are medians over synchronized steps. Every result is one
line of JSON, printed when it is measured. What does not end within `--budget` seconds is left out and named in the last line,
whose field `sizing` is a value for `diffdis sizing --constants`. `--smoke` uses a tiny model and also runs on a CPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import sd_v1_laion, sd_v1_laion_joint_mask
from diffdis_platform.sizing.counts import clip_text_encoder, count, stable_diffusion_autoencoder
from diffdis_platform.sizing.estimate import launches, memory
from ray_platform.train.config import BatchPlan
from ray_platform.train.statistics import peak_flops
from tests.benchmarks.accelerator_parts import KERNELS, measure_all
from tests.support.tiny_checkpoints import save_clip_tokenizer, save_stable_diffusion


@dataclass(frozen=True)
class Setting:
    """Changes to the recipe."""

    px: int = 512
    micro_batch: int = 24
    task: str = "joint"
    joint_mask: bool = False
    train: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig


FAST = {"channels_last": True, "compile": True}
# The most informative first. The first one is measured in full.
SETTINGS = {
    "512": Setting(),
    "512_channels_last_compile": Setting(train=FAST),
    "512_channels_last": Setting(train={"channels_last": True}),
    "512_compile": Setting(train={"compile": True}),
    "256": Setting(256, 96),
    "256_channels_last_compile": Setting(256, 96, train=FAST),
    "512_zero_2": Setting(train={"zero_stage": 2}),
    "512_joint_mask": Setting(joint_mask=True),
    "512_generation": Setting(task="generation"),
    "512_alignment": Setting(task="alignment"),
    "512_fp16": Setting(train={"precision": "fp16"}),
}


def configuration(setting: Setting, folder: Path, smoke: bool) -> PretrainConfig:
    base = sd_v1_laion_joint_mask() if setting.joint_mask else sd_v1_laion()
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
    if smoke and not torch.cuda.is_available():
        train = replace(train, precision="bf16" if train.precision == "fp16" else train.precision, gpus_per_worker=0)
    return replace(base, model=model, train=train, objective=replace(base.objective, task=setting.task))


def save_encoders(folder: Path, smoke: bool) -> None:
    """Write vae/, text_encoder/ and tokenizer/ with random weights to a folder."""
    if smoke:
        save_stable_diffusion(folder)
        return
    stable_diffusion_autoencoder().save_pretrained(folder / "vae")
    special = save_clip_tokenizer(folder / "tokenizer")
    tokens = {"bos_token_id": special.bos_token_id, "eos_token_id": special.eos_token_id}
    clip_text_encoder(sd_v1_laion().model.text_encoder, **tokens).save_pretrained(folder / "text_encoder")


def measured(
    jobs: Sequence[tuple[str, PretrainConfig | None]], in_full: str, smoke: bool, end: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, result) of the jobs in their order, until the time `end`. After a failure, the rest runs in a new process.

    The setting called `in_full` is measured in full.
    """
    context, left = multiprocessing.get_context("spawn"), list(jobs)
    while left and time.monotonic() < end:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=measure_all, args=(sender, left, in_full, smoke), daemon=True)
        process.start()
        sender.close()
        try:
            while left and receiver.poll(max(0.0, end - time.monotonic())):
                name, found = receiver.recv()
                left.pop(0)
                yield name, found
        except EOFError:  # the process has ended, after a failure that it sent or could not send
            process.join()
            if process.exitcode:
                yield left.pop(0)[0], {"failed": f"the process ended with code {process.exitcode}"}
        finally:
            process.kill()
            process.join()


def with_predictions(found: dict[str, Any], config: PretrainConfig) -> dict[str, Any]:
    """Return the measured values together with the values that sizing predicts and assumes."""
    counts, size = count(config), config.train.micro_batch_size
    rate, plan = size / found["seconds_per_step"], BatchPlan.of(size, 1, size)
    result = {"samples_per_second": rate, "tflops_per_second": rate * counts.executed_flops / 1e12} | found
    result["memory_gb_predicted"] = memory(counts, config.train, plan, live=False).total / 1e9
    result["launches"] = launches(counts, config.train, plan)
    peak = peak_flops(torch.device("cuda")) if torch.cuda.is_available() else 0.0
    if peak:
        result["mfu"] = rate * counts.executed_flops / peak
    if peak and "encode_seconds_per_sample" in found:
        result["encoder_mfu"] = counts.encoders.flops / found["encode_seconds_per_sample"] / peak
    return result


def rounded(value: Any) -> Any:
    """Return four significant digits of every number inside."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def for_sizing(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return constants for sizing: `mfu` of the setting with the highest, and `launch_us` of steps with few samples."""
    found = {"mfu": max((result.get("mfu", 0.0) for result in results.values()), default=0.0)}
    for whole in (result for result in results.values() if "host_seconds_per_step" in result):
        found["launch_us"] = 1e6 * whole["host_seconds_per_step"] / whole["launches"]
        found["encoder_mfu"] = whole.get("encoder_mfu", 0.0)
        found["host_copy_gb_per_second"] = whole["checkpoint_gb"] / whole["checkpoint_copy_seconds"]
    return {name: rounded(value) for name, value in found.items() if value}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--budget", type=float, default=280.0, help="seconds, after which the rest is left out")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    end, results, output = time.monotonic() + options.budget, dict[str, Any](), sys.stdout
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_encoders(folder, options.smoke)
        configs = {name: configuration(SETTINGS[name], folder, options.smoke) for name in options.only}
        jobs = [*((name, None) for name in KERNELS), *configs.items()]
        for name, found in measured(jobs, options.only[0], options.smoke, end):
            results[name] = with_predictions(found, configs[name]) if "seconds_per_step" in found else found
            print(json.dumps({"name": name} | rounded(results[name])), file=output, flush=True)
    last = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "skipped": [name for name, _ in jobs if name not in results],
        "sizing": for_sizing(results),
    }
    print(json.dumps(last))


if __name__ == "__main__":
    main()
