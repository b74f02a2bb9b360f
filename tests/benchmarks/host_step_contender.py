"""A contender of host_step.py: one setting of the training step in one process. It also runs in the code of earlier commits.

    python host_step_contender.py SETTING

SETTING: `recipe`, or `one_way_zero_2` and the like. Reads questions from standard input and prints `answer` and JSON for each.
"""

import collections
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffdis.model import DiffDis
from diffdis.objective import Objective
from diffdis.task import DiffDisTask
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import sd_v1_laion
from tests.support.tiny_checkpoints import save_stable_diffusion

WIDTH, SIZE, STEPS, FULL_BATCH = 32, 2, 8, 16
# Operations that launch no kernel on an accelerator.
_VIEWS = [
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "detach",
    "expand",
    "slice",
    "unsqueeze",
    "squeeze",
    "select",
    "alias",
    "split",
    "as_strided",
    "unbind",
    "lift_fresh",
    "_reshape_alias",
    "narrow",
    "empty",
    "chunk",
    "split_with_sizes",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "is_same_size",
    "_local_scalar_dense",
    "unfold",
    "diagonal",
    "set_",
    "resize_",
    "is_pinned",
]


class Kernels(TorchDispatchMode):
    """Counter of the operations that launch a kernel, and of the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name not in _VIEWS and function.namespace == "aten":
            self.counts[name] += 1
            read, written = list(_tensors((args, kwargs))), list(_tensors(out))
            known = {id(tensor) for tensor in read}
            self.bytes += sum(_nbytes(t) for t in [*read, *(t for t in written if id(t) not in known)])
        return out


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def configuration(setting: str) -> PretrainConfig:
    """Return the recipe, with the mask and the ZeRO stage of the setting."""
    config = sd_v1_laion()
    if setting != "recipe":
        visibility, _, stage = setting.rpartition("_zero_")
        draws = 1 if visibility == "joint" else config.objective.num_draws
        model = replace(config.model, query_visibility=visibility)
        train = replace(config.train, zero_stage=int(stage))
        config = replace(config, model=model, train=train, objective=replace(config.objective, num_draws=draws))
    return config


def narrow(config: PretrainConfig, encoders: Path) -> PretrainConfig:
    """Return the configuration with all layers and heads at width 32 and 8 x 8 latents, for one rank without accelerator."""
    base = config.model
    unet = replace(base.unet, sample_size=8, block_out_channels=(WIDTH,) * 4, attention_head_dim=4, norm_num_groups=8)
    text = replace(base.text_encoder, path=str(encoders), token_dim=WIDTH, embedding_dim=WIDTH, max_length=8)
    head = replace(base.head, width=WIDTH, num_heads=4)
    autoencoder = replace(base.autoencoder, path=str(encoders))
    model = replace(base, image_size=64, unet=unet, text_encoder=text, head=head, autoencoder=autoencoder)
    train = replace(config.train, num_workers=1, micro_batch_size=SIZE, warmup_steps=1, gpus_per_worker=0)
    return replace(config, model=model, train=train)


def inputs_of(config: PretrainConfig, size: int) -> dict[str, torch.Tensor]:
    unet, text = config.model.unet, config.model.text_encoder
    query = torch.nn.functional.normalize(torch.randn(size, text.embedding_dim), dim=-1)
    return {
        "latent": torch.randn(size, unet.in_channels, unet.sample_size, unet.sample_size),
        "token_states": torch.randn(size, text.max_length, text.token_dim),
        "query": query,
        "caption_ids": torch.arange(size),
        "null_states": torch.randn(1, text.max_length, text.token_dim),
    }


class Step:
    """The engine of a setting, and one batch."""

    def __init__(self, config: PretrainConfig):
        from ray_platform.train.checkpoint_format import LossHistory
        from ray_platform.train.engine import Engine
        from ray_platform.train.fault_tolerance import LossMonitor

        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        torch.manual_seed(0)
        self.engine = Engine(DiffDisTask(config.model, config.objective), config.train, SIZE, 1)
        # On a CPU, the engine selects plain attention kernels for bf16, which are ten operations instead of an accelerator's one.
        self.engine._attention_kernels = contextlib.nullcontext
        self.monitor = LossMonitor(config.train, LossHistory(), "")
        self.inputs, self.number = inputs_of(config, SIZE), 0
        for _ in range(3):
            self()

    def __call__(self) -> None:
        self.number += 1
        loss, _ = self.engine.backward([self.inputs], [self.number])
        flags = dict.fromkeys(("stop", "checkpoint_due", "uploading", "upload_failed", "num_bad", "epoch_samples"), 0)
        self.engine.update(self.number, skip=self.monitor.sync_step_status(loss, **flags).is_bad)

    def cpu_ms(self) -> float:
        """Return the median CPU time of a step."""
        times = []
        for _ in range(STEPS):
            begun = time.process_time()
            self()
            times.append(1e3 * (time.process_time() - begun))
        return statistics.median(times)

    def counts(self) -> dict[str, int]:
        from tests.support.step_counts import count

        with Kernels() as kernels:
            self()
        waits = count(self).host_waits
        return {"launches": kernels.counts.total(), "casts": kernels.counts["_to_copy"], "host_waits": waits}


def gigabytes(config: PretrainConfig) -> float:
    """Return the GB through memory in forward and backward of 16 samples at full size, on fake tensors."""
    from ray_platform.train.engine import convert_weights

    with FakeTensorMode():
        module = Objective(DiffDis(replace(config.model, trained_for=config.objective.task)), config.objective)
        convert_weights(module, [{"params": list(module.model.temperature.parameters())}], config.train.precision)
        inputs = inputs_of(config, FULL_BATCH)
        with Kernels() as kernels:
            module(inputs, 0)[0].backward()
    return round(kernels.bytes / 1e9, 1)


def main() -> None:
    torch.set_num_threads(1)
    setting = sys.argv[1]
    config = configuration(setting)
    with tempfile.TemporaryDirectory() as folder:
        save_stable_diffusion(Path(folder))
        step = Step(narrow(config, Path(folder)))
    answers = {"cpu_ms": step.cpu_ms, "counts": step.counts, "gigabytes": lambda: gigabytes(config)}
    for line in sys.stdin:
        print("answer", json.dumps(answers[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
