"""`diffdis demo` (`make demo`): build the data, pretrain on a Ray head of this command, evaluate, and report the results."""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from diffdis_platform.commands import run_page_text
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.config.pretrain import ALIASES, MAIN_FIELDS, PretrainConfig
from diffdis_platform.recipes.demo import DEMO_DATA, DEMO_QUALITY, PREVIEW_CAPTIONS, demo
from ray_platform.checkout import checkout_root
from ray_platform.contracts import ConfigError, UserError

INTERRUPTED = "stopped; the same command resumes from the last checkpoint"

HELP = CommandHelp(
    "demo",
    "Build the demo's data, pretrain on it, and report the results. The options are those of `diffdis pretrain`, except the two "
    "that say where the data and the results are.",
    examples=("", "--train.num_steps 1e3"),
    fields=tuple(name for name in MAIN_FIELDS if name not in ("output_dir", "data.sources")),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[PretrainConfig]:
    command = parse(PretrainConfig, argv, HELP, recipes={"demo": demo}, aliases=ALIASES)
    for name, value in (("output_dir", command.config.output_dir), ("data.sources", command.config.data.sources)):
        if value:
            raise ConfigError(f"{name}: the demo sets it; leave it out, or use `diffdis pretrain --recipe demo`")
    return command


def main(argv: Sequence[str]) -> int:
    """Arguments are passed on to `diffdis pretrain`."""
    parse_arguments(argv)
    from diffdis_platform.demo.builder import ENTRIES_SHA256, build
    from diffdis_platform.demo.report import SUMMARY, table, write_report

    output = (checkout_root() or Path.cwd()) / "outputs" / "demo"
    print(build(DEMO_DATA, None, os.cpu_count() or 1, ENTRIES_SHA256), flush=True)
    if (output / SUMMARY).exists():
        print(f"{output} holds a finished run; delete the folder to train again")
        summary = json.loads((output / SUMMARY).read_text())
    else:
        if not (output / "train_summary.json").exists():
            _pretrain(output, argv)
        summary = write_report(output, DEMO_DATA, PREVIEW_CAPTIONS)
    print(f"\n{table(summary)}\n\n{run_page_text(summary['mlflow'])}\n\nnext:\n{_next_commands(output)}")
    return 0


def _next_commands(output: Path) -> str:
    """Return three commands to try with the trained model, which need no active virtual environment."""
    diffdis, folder, data = (shlex.quote(str(path)) for path in (Path(sys.executable).with_name("diffdis"), output, DEMO_DATA))
    sampler = f"--scheduler {DEMO_QUALITY.scheduler} --num_steps {DEMO_QUALITY.num_steps} "
    sampler += f"--guidance_scale {DEMO_QUALITY.guidance_scales[0]:g}"
    return "\n".join(
        [
            f"  {diffdis} generate --model {folder} --captions 'red heart' 'green apple' {sampler} --output_dir {folder}/images",
            f"  {diffdis} eval --checkpoint {folder} --suite demo --data_roots {data} --output_dir {folder}/evaluation",
            f"  {diffdis} pretrain --help",
        ]
    )


def _pretrain(output: Path, argv: Sequence[str]) -> None:
    """Pretrain with `ray job submit` from a checkout; a wheel has no folder to submit, so its driver runs here."""
    import torch

    from ray_platform.local_head import LOG, LocalHead, run_filtered, submit

    arguments = ["--recipe", "demo", "--train.resume", "auto", "--output_dir", str(output), "--data.sources"]
    arguments += [str(DEMO_DATA / "train"), "--tracking.registered_model", "diffdis-demo"]
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        arguments += ["--train.precision", "bf16"]  # a step takes 0.75 to 0.87 of the time (LOG.md)
    arguments += argv
    root = checkout_root()
    with LocalHead() as head:
        if root:
            variables = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            status = submit(head, ["python", "jobs/pretrain.py", *arguments], root, variables, output / LOG)
        else:
            command = [sys.executable, "-m", "diffdis_platform.cli", "pretrain", *arguments]
            status = run_filtered(command, head.env, output / LOG)
    if status:
        raise UserError(f"demo: pretraining ended with status {status}; see {output / LOG}")
