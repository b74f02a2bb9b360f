"""The sizing model's predictions match real files, modules and ranks, and docs/sizing.md matches the command's output."""

import dataclasses
import gc
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from diffdis.config import ObjectiveConfig, tiny
from diffdis.encoder import FrozenEncoder
from diffdis.task import DiffDisTask
from diffdis_platform.cli import run_command
from diffdis_platform.commands import pretrain
from diffdis_platform.commands.sizing import parse_arguments, predict
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.sizing.config import GPU_MEMORY
from diffdis_platform.sizing.counts import Counts, Encoders, KernelCounter, count, measure_step
from diffdis_platform.sizing.estimate import Memory, best_interval, checkpoint_bytes, memory, report, useful_fraction
from ray_platform.contracts import Batch, ConfigError, MixtureState
from ray_platform.data.precomputed import to_arrow
from ray_platform.placement import PEAK_FLOPS
from ray_platform.train.config import BatchPlan, TrainConfig
from ray_platform.train.profiling import count_flops
from tests.benchmarks import accelerator
from tests.diffdis.test_auxiliary_losses import NETWORK as COLOR_NETWORK
from tests.support.ranks import shared_ranks

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow  # counting takes seconds
CPU = torch.device("cpu")
ONE_LEVEL = dataclasses.replace(
    tiny().unet, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
)


@pytest.fixture
def recipe(tiny_model):
    """Return recipe(train fields, objective fields, model fields), which builds the full configuration of a tiny model."""

    def make(train=None, objective=None, **model) -> PretrainConfig:
        return PretrainConfig(
            model=dataclasses.replace(tiny_model, unet=ONE_LEVEL, **model),
            objective=ObjectiveConfig(**(objective or {})),
            train=TrainConfig(**{"micro_batch_size": 4, **(train or {})}),
        )

    return make


def pixels(number):
    return np.random.default_rng(0).integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)


def batch(number):
    captions = ["red heart", "blue circle"] * (number // 2)
    return Batch({"image": pixels(number)}, captions, ["k"] * number, (), {})


# Options that change what a step computes. All noisy images are recognizable: chance does not decide on how many there are.
OPTIONS = {
    "lora": {"lora_rank": 2},
    "repa": {"repa_weight": 0.5, "repa_network": COLOR_NETWORK},
    "dispersive": {"dispersive_weight": 0.5},
    "caption_contrast": {"caption_contrast_weight": 0.5},
    "weights": {"generation_weighting": "min_snr", "channel_weights": (1.0,) * 12},
    "noise": {"noise_offset": 0.1, "timestep_sampling": "logit_normal"},
    "siglip": {"alignment_loss": "siglip"},
    "noised_alignment": {"noised_alignment_weight": 1.0, "caption_dropout": 1.0, "noised_alignment_limit": 1000, "num_draws": 2},
}
OF_GENERATION = [name for name in OPTIONS if name not in ("siglip", "noised_alignment")]
CASES = [
    ("joint", "one_way", list(OPTIONS)),
    *(
        pytest.param(*case, marks=SLOW)
        for case in (
            *(("joint", "one_way", names) for names in ([], *([name] for name in OPTIONS))),
            ("joint", "joint", [*OF_GENERATION, "siglip"]),
            *(
                ("generation", mask, names)
                for mask, names in (("joint", []), ("joint", OF_GENERATION), ("one_way", OF_GENERATION))
            ),
            *(
                (task, mask, names)
                for task in ("alignment", "clip")
                for mask in ("one_way", "joint")
                for names in ([], ["lora", "siglip"])
            ),
        )
    ),
]


@pytest.mark.parametrize(("task", "visibility", "names"), CASES)
def test_operations_parameters_and_activations_are_those_of_a_real_step(recipe, task, visibility, names):
    """The trainer counts on two samples of its batch, with the module that it then trains."""
    options = {field: value for name in names for field, value in OPTIONS[name].items()}
    config = recipe(objective={"task": task, **options}, query_visibility=visibility)
    built = DiffDisTask(config.model, config.objective)
    counts = count(config)
    assert counts.flops == count_flops(built.module, built.inputs(batch(2), CPU), seed=0) / 2
    parameters = list(built.module.parameters())
    assert counts.trained == sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    assert counts.frozen == sum(parameter.numel() for parameter in parameters) - counts.trained
    real = measure_step(built.module.train(), built.inputs(batch(4), CPU), half=False)  # tensors with data
    operations, launches, most = real
    assert counts.activation_bytes == pytest.approx(most, rel=0.02)
    assert counts.executed_flops * 4 == pytest.approx(operations, rel=1e-6)
    assert counts.launches == pytest.approx(launches, rel=0.01)


@SLOW
def test_adapters_need_little_memory_and_a_network_of_images_needs_time(recipe):
    plain, adapted = (recipe(objective={"task": "generation", "lora_rank": rank}) for rank in (0, 2))
    plan = BatchPlan(1, 4, 1)
    states, adapted_states = (memory(count(config), config.train, plan, live=False).states for config in (plain, adapted))
    assert adapted_states < 0.5 * states
    counts = count(adapted)
    assert counts.trained < 0.1 * counts.frozen
    assert counts.num_tensors < 0.5 * count(plain).num_tensors, "ZeRO reduces only what is trained"
    with_network = recipe(objective={"task": "generation", "repa_weight": 0.5})
    efficientnet, of_encoders = count(with_network).encoders, count(plain).encoders.flops
    assert efficientnet.flops - of_encoders == pytest.approx(0.8e9, rel=0.1), "2 x 0.4 G multiplications (Tan and Le 2019)"


def test_views_and_allocations_launch_nothing():
    weight = torch.ones(3, requires_grad=True)
    with KernelCounter([weight]) as tracker:
        product = weight.view(1, 3).expand(2, 3) * torch.empty(2, 3)  # one
        product.transpose(0, 1)[:1].add_(1)  # one
    assert tracker.launches == 2
    with KernelCounter([weight]) as tracker:
        product.mul(2)  # one
    assert tracker.launches == 1


@SLOW
def test_what_is_computed_again_is_executed_and_not_the_models_own_work(recipe):
    plain, again = (count(recipe({"activation_checkpointing": on})) for on in (False, True))
    assert again.flops == plain.flops
    assert 1.1 < again.executed_flops / plain.executed_flops < 1.4
    assert again.activation_bytes < 0.75 * plain.activation_bytes
    cached = recipe(objective={"negatives": "step"})
    assert count(cached, 4).executed_flops > count(cached, 1).executed_flops == pytest.approx(plain.executed_flops)


def test_precomputed_rows_are_as_large_as_the_files(recipe):
    config, number = recipe(), 256
    rows = FrozenEncoder(config.model).encode(pixels(number), ["a red heart"] * number)
    size = len(to_arrow([f"00000.tar/{n:09d}" for n in range(number)], ["a red heart"] * number, rows))
    assert number * (count(config).row_bytes + 40) == pytest.approx(size, rel=0.03)


def live_storages() -> dict[int, int]:
    """Return the storages of all live tensors: address -> bytes."""
    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):
            for tensor in (value, value.grad if value.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return storages


def tensor_bytes(file: Path) -> int:
    """The size of a .safetensors without its header, which is large next to the tensors of so small a model."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def rank_states(rank: int, config: PretrainConfig, folder: str) -> tuple[int, int]:
    """Return (bytes that the engine holds including a step's gradients, bytes of the checkpoint that the ranks wrote)."""
    from ray_platform.train.checkpoint_format import contiguous_on_cpu
    from ray_platform.train.checkpointing import AsyncUploader, RankState, TensorAssignment
    from ray_platform.train.engine import Engine
    from ray_platform.train.fault_tolerance import LossHistory

    gc.collect()
    before = live_storages()
    task = DiffDisTask(config.model, config.objective)
    encoders = sum(p.untyped_storage().nbytes() for m in (task.autoencoder, task.text_encoder) for p in m.state_dict().values())
    engine = Engine(task, config.train, 2, 1)
    inputs = task.inputs(batch(2), engine.device)
    for step in range(2):
        engine.backward([inputs], [step])
        gc.collect()
        now = live_storages()
        engine.update(step)
    uploader = AsyncUploader(folder, rank, "t", lambda: None)
    assignment, tensors = TensorAssignment(torch.distributed.get_world_size()), {}
    for key, tensor, is_replicated in engine.local_state():
        if not is_replicated or assignment.owner(tensor) == rank:
            tensors[key] = contiguous_on_cpu(tensor)
    uploader.upload(2, tensors, {}, RankState.capture({}, LossHistory(), MixtureState()))
    uploader.wait()
    torch.distributed.barrier()
    given = sum(value.untyped_storage().nbytes() for value in inputs.values())
    written = sum(tensor_bytes(file) for file in Path(folder).rglob("*.safetensors"))
    return sum(size for place, size in now.items() if place not in before) - encoders - given, written


@SLOW
@pytest.mark.parametrize(("zero_stage", "ema_decay"), [(0, 0.0), (1, 0.0), (2, 0.9), (3, 0.0)])
def test_states_and_checkpoints_are_as_large_as_real_ones(recipe, tmp_path, zero_stage, ema_decay):
    zero = {"reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    live = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    fields = {"deepspeed": {"zero_optimization": zero | live}} if zero_stage else {}
    config = recipe({"zero_stage": zero_stage, "ema_decay": ema_decay, **fields})
    counts = count(config)
    (states, written), _ = shared_ranks(2).run(rank_states, config, str(tmp_path / "run"))
    predicted = memory(counts, config.train, BatchPlan(2, 2, 1), live=False)
    # Predicted is the peak under ZeRO 0: the gradients of all parameters and their joined copy, which alone is left afterwards.
    joined_twice = 0 if zero_stage else 4 * counts.trained
    assert states == pytest.approx(predicted.states - joined_twice + (predicted.buffers if zero_stage else 0), rel=0.05)
    assert written == pytest.approx(checkpoint_bytes(counts, config.train), rel=0.05)


# Counts of the demo. The predictions are arithmetic over such counts, which the tests above compare with real ones.
COUNTS = Counts(
    trained=6_221_165, frozen=0, num_tensors=403, launches=1_500, flops=1.136e9, executed_flops=1.14e9,
    activation_bytes=217_642_548, row_bytes=16_128, embedding_dim=384,
    encoders=Encoders(22_713_216, 90_852_864, 0.0, 256_425_984.0, 6_881_280),
)  # fmt: skip


@pytest.fixture
def estimates(tmp_path, monkeypatch):
    """Return estimates(*sizing options, fields=pretrain options, **constants), which predicts for the demo without host time."""
    monkeypatch.setattr("diffdis_platform.sizing.counts.count", lambda run, num_micro_batches: COUNTS)

    def run(*arguments, fields=(), **constants):
        (tmp_path / "config.yaml").write_text(pretrain.parse_arguments(fields).yaml)
        values = json.dumps({"launch_us": 0} | constants)
        return predict(
            parse_arguments(["--run_config", str(tmp_path / "config.yaml"), "--constants", values, *arguments]).config
        )[1]

    return run


def test_one_gpu_has_no_network_and_many_scale_below_linear(estimates):
    one, eight, many = estimates("--num_gpus", "1", "8", "1024")
    assert one.network_seconds == 0
    assert one.samples_per_second == pytest.approx(one.global_batch_size / one.step_seconds)
    assert one.scaling == 1 > eight.scaling > many.scaling
    assert one.faults.hours_between_failures == pytest.approx(128 * many.faults.hours_between_failures)


def test_the_memory_is_that_of_the_type_of_gpu_unless_it_is_given(estimates, monkeypatch):
    monkeypatch.setattr("diffdis_platform.sizing.estimate.memory", lambda *arguments: Memory(60e9, 0, 0, 0))
    assert not estimates("--gpu", "L4", "--num_gpus", "8")[0].fits
    assert estimates("--num_gpus", "8")[0].fits
    assert GPU_MEMORY.keys() == PEAK_FLOPS.keys()
    assert not estimates("--gpu", "H200", "--num_gpus", "8", gpu_memory_gb=70)[0].fits


def test_half_the_use_of_a_gpu_takes_twice_the_time(estimates):
    # Excludes the encoders, whose rate is another constant, and uploads and S3 reads, which limit the demo's steps.
    options = {"fields": ["--train.checkpoint_every", "1000000"], "s3_gb_per_second": 1000}
    (fast,), (slow,) = (estimates("--num_gpus", "1", "--inputs", "precomputed", mfu=mfu, **options) for mfu in (0.4, 0.2))
    assert slow.samples_per_second == pytest.approx(fast.samples_per_second / 2)
    assert slow.gpu_hours == pytest.approx(2 * fast.gpu_hours, rel=0.01)


def test_the_bottleneck_is_the_slowest_part(estimates):
    (small,) = estimates("--num_gpus", "8")
    assert small.bound == "decoding"  # images cannot be decoded fast enough for such a small model
    assert small.cpu_nodes == math.ceil((small.input_cores - small.spare_cores) / 64)
    for bound, constants in (("compute", {}), ("S3", {"s3_gb_per_second": 1e-5}), ("network", {"node_gb_per_second": 1e-3})):
        assert estimates("--num_gpus", "8", mfu=1e-4, **constants)[0].bound == bound
    options = ("--num_gpus", "1", "--inputs", "precomputed")
    for stage, number in enumerate(COUNTS.launches + n * COUNTS.num_tensors for n in (0, 1, 2)):
        (waiting,) = estimates(*options, fields=["--train.zero_stage", str(stage)], launch_us=500)
        assert waiting.bound == "host"
        assert waiting.step_seconds == pytest.approx(number * 500e-6, rel=0.01)


def test_network_time_and_bytes_follow_the_formulas(estimates):
    (one,) = estimates("--num_gpus", "64", fields=["--train.zero_stage", "0"], latency_us=0, overlap=0)
    assert one.network_seconds - one.traffic.contrastive == pytest.approx(2 * 63 / 64 * 4 * COUNTS.trained / 40e9)
    for stage, times in ((0, 2), (1, 2), (2, 2), (3, 3)):
        (one,) = estimates("--num_gpus", "8", fields=["--train.zero_stage", str(stage)])
        assert one.traffic.bytes_sent == pytest.approx(times * 7 / 8 * 4 * COUNTS.trained)


def test_zero_0_accumulates_and_sends_gradients_in_float32(estimates):
    fields = ["--train.zero_stage", "0", "--train.precision", "bf16", "--train.micro_batch_size", "8"]
    options = [[*fields, "--train.global_batch_size", str(8 * 8 * number)] for number in (1, 2)]
    (one,), (two,) = (estimates("--num_gpus", "8", fields=fields) for fields in options)
    assert one.traffic.bytes_sent == pytest.approx(2 * 7 / 8 * 2 * COUNTS.trained)
    assert two.traffic.bytes_sent == pytest.approx(2 * 7 / 8 * 4 * COUNTS.trained)
    assert two.memory.states - one.memory.states == 4 * COUNTS.trained


def test_precomputed_inputs_need_no_encoders_and_more_storage(estimates):
    live, precomputed = (estimates("--num_gpus", "8", "--inputs", inputs)[0] for inputs in ("live", "precomputed"))
    assert precomputed.encode_seconds == 0 < live.encode_seconds
    assert live.precomputed_tb == 0 < precomputed.precomputed_tb
    assert precomputed.precompute_gpu_hours > 0


def test_the_best_interval_loses_the_least():
    """Daly's formula agrees with a search over the full range."""
    stall, between = 60.0, 36_000.0
    best = best_interval(stall, between)
    lost = {factor: 1 - useful_fraction(factor * best, stall, 0, 0, between) for factor in (0.5, 0.9, 1, 1.1, 2)}
    assert min(lost, key=lost.get) == 1
    assert best == pytest.approx(math.sqrt(2 * stall * between), rel=0.05)  # Young's formula
    assert math.isinf(best_interval(stall, math.inf))
    assert useful_fraction(1000, 0, 0, 0, math.inf) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_gpus", "[]"], r"num_gpus: \[\]; give numbers from 1"),
        (["--num_gpus", "8", "0"], "give numbers from 1"),
        (["--dataset", "laion"], "dataset: laion is unknown; choose one of laion_400m, laion_5b"),
        (["--num_pairs", "-1"], "num_pairs"),
        (["--epochs", "nan"], "epochs"),
        (["--image_size", "100"], "image_size"),
        (["--gpu", "A1000"], "gpu: A1000 is unknown"),
        (["--constants", "{mfu: 35}"], "constants: mfu is 35"),
        (["--constants", "{gpu_hour: -2}"], "constants: gpu_hour is -2"),
        (["--constants", "{gpus: 2}"], "constants: gpus is unknown"),
        (["--constants", "{issue_us: 260}"], "constants: issue_us was replaced; give launch_us"),
        (["--recipe", "none"], "--recipe none: no such recipe"),
    ],
)
def test_bad_fields_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=f"^[^\n]*{message}[^\n]*$"):
        predict(parse_arguments(arguments).config)


def test_a_model_that_cannot_be_built_is_one_line(recipe):
    with pytest.raises(ConfigError, match=r"^objective\.freeze: no parameter is called unet\.dwn[^\n]*$"):
        count(recipe(objective={"freeze": ("unet.dwn.*",)}))


def test_the_command_prints_one_screen_and_writes_all_figures(estimates, capsys, tmp_path):
    """The fixture replaces the counting of parameters and FLOPs."""
    arguments = ["--recipe", "demo", "--num_gpus", "1", "8", "--constants", '{"failures_per_node_day": 0}']
    assert run_command("sizing", [*arguments, "--json", str(tmp_path / "new" / "sizing.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert any(line.startswith("samples/s ") for line in lines)
    assert not any("fits with" in line for line in lines)
    assert run_command("sizing", ["--recipe", "demo", "--num_gpus", "1", "--constants", '{"gpu_memory_gb": 0.42}']) == 0
    assert re.search(r"\(too much\) *\n +fits with ZeRO stage, samples +0, 16 *\n", capsys.readouterr().out)
    figures = json.loads((tmp_path / "new" / "sizing.json").read_text(), parse_constant=pytest.fail)
    assert [e["num_gpus"] for e in figures["estimates"]] == [1, 8]
    assert figures["counts"]["trained"] == COUNTS.trained
    assert figures["constants"]["gpu_hour"] == 3
    assert figures["estimates"][0]["faults"]["best_interval_seconds"] is None, "never, without failures"
    assert run_command("sizing", [*arguments, "--json", "/proc/sizing.json"]) == 1
    assert capsys.readouterr().err.startswith("error: /proc/sizing.json: ")


DOCS = (ROOT / "docs" / "sizing.md").read_text() if (ROOT / "docs" / "sizing.md").exists() else ""
SHOWN = re.findall(r"```\ndiffdis sizing (.*?)\n```\n\n```text\n(.*?)\n```", DOCS, re.DOTALL)


@SLOW
@pytest.mark.parametrize("number", range(len(SHOWN)))
def test_the_tables_of_the_docs_are_what_the_command_prints(number):
    arguments, shown = SHOWN[number]
    config = parse_arguments(shlex.split(arguments.replace("\\\n", " "))).config
    assert report(config, *predict(config)) == shown


@pytest.mark.ranks
def test_the_benchmark_of_an_accelerator_prints_what_sizing_takes(capsys):
    """Uses a tiny model on a CPU, whose peak FLOP/s are unknown, so two of the constants are missing."""
    accelerator.main(["--smoke", "--only", "512"])
    *lines, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [line["name"] for line in lines] == ["convolution", "attention", "group_norm_silu", "512"]
    assert [(row["head_width"], row["tokens"]) for row in lines[1]["rows"][:4]] == [(40, 16), (40, 17), (64, 16), (64, 17)]
    step = lines[3]
    assert step["samples_per_second"] == pytest.approx(4 / step["seconds_per_step"], rel=0.01)
    assert len(step["kernels"]) == 15
    assert last["skipped"] == []
    assert last["sizing"]["launch_us"] == pytest.approx(1e6 * step["host_seconds_per_step"] / step["launches"], rel=0.01)
    parse_arguments(["--constants", json.dumps(last["sizing"])])


def test_the_benchmark_of_an_accelerator_names_what_it_had_no_time_for(capsys):
    accelerator.main(["--smoke", "--only", "512", "512_fp16", "--budget", "0"])
    (last,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["skipped"] == ["convolution", "attention", "group_norm_silu", "512", "512_fp16"]
    assert last["sizing"] == {}
