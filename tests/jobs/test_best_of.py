"""The sampler of images, the command that generates them, and the best of several by the model, another one, or none."""

import json
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image

from diffdis.config import ObjectiveConfig
from diffdis.feature_networks import PooledFeatures
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from diffdis_platform.cli import run_command
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig
from diffdis_platform.evaluation.run import plan_evaluation
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.unit_work import WorkerModels
from tests.support.evaluation_sets import write_image
from tests.support.tiny_checkpoints import draw_query_weights

PROMPTS, BEST_OF = ["red heart", "blue circle", "green leaf"], 3
NETWORK = f"{__name__}:build_pixel_network"


def build_pixel_network(device, options):
    return PooledFeatures(
        lambda x: x[:, ::8, ::8].flatten(1), lambda images, device: torch.from_numpy(images), device, "fd_pixels", {}
    )


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """Folder with an untrained model for each of three tasks, prompts and reference images."""
    folder = tmp_path_factory.mktemp("models")
    for task_name in ("joint", "generation", "clip"):
        torch.manual_seed(1)
        task = DiffDisTask(tiny_model, ObjectiveConfig(task=task_name))
        if task_name == "joint":
            draw_query_weights(task.module.model)
        task.save_pretrained(task.module.state_dict(), folder / task_name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for seed in range(4):
        write_image(folder / "images" / f"{seed}.png", seed)
    return folder


def measure(folder, task, output, **quality):
    """Return the point of the report and the rows of the generated images."""
    fields = {
        "prompts": str(folder / "prompts.txt"),
        "reference": str(folder / "images"),
        "networks": (NETWORK,),
        "guidance_scales": (1.0,),
        "num_steps": 1,
    }
    config = QualityConfig(**fields | quality)
    evaluation = EvalConfig(checkpoint=str(folder / task), output_dir=str(output), quality=config)
    plan = plan_evaluation(evaluation, ({}, {}))
    measurement, workers = plan.quality, WorkerModels(plan.builders, 1, "cpu")
    for unit in measurement.units:
        rows = unit.work.run(workers) | {"seconds": np.ones(1)}
        measurement.add(unit, rows)
    (point,) = measurement.results({})
    return point, rows, workers[plan.model.identity].pipeline


def test_a_sampler_of_diffusers_generates_the_images_that_are_measured(folder, tmp_path):
    point, rows, pipeline = measure(folder, "generation", tmp_path / "ddpm", num_steps=2, scheduler="DDPMScheduler")
    ddim, ddim_rows, _ = measure(folder, "generation", tmp_path / "ddim", num_steps=2)
    assert [each["protocol"]["sampler"] for each in (point, ddim)] == ["DDPMScheduler", "ddim"]
    pipeline.scheduler = "DDPMScheduler"
    images = pipeline.generate(PROMPTS, num_inference_steps=2, guidance_scale=1.0)
    features = build_pixel_network(torch.device("cpu"), None).features(np.stack([np.asarray(image) for image in images]))
    assert abs(features - rows[f"features/{NETWORK}"]).max() <= 1
    assert abs(features - ddim_rows[f"features/{NETWORK}"]).max() > 1
    with pytest.raises(ConfigError, match=r"^quality\.scheduler: diffusers has no scheduler 'Ddpm'; use .*DDPMScheduler"):
        measure(folder, "generation", tmp_path / "typo", scheduler="Ddpm")


def test_a_model_chooses_its_own_images_and_the_single_ones_stay(folder, tmp_path):
    point, rows, pipeline = measure(folder, "joint", tmp_path / "best", best_of=BEST_OF)
    single, single_rows, _ = measure(folder, "joint", tmp_path / "single")
    name = next(name for name in single["metrics"] if name.startswith("fd_"))
    assert {**point["metrics"], **single["metrics"]} == point["metrics"], "single images do not depend on best_of"
    assert point["metrics"].keys() - single["metrics"].keys() >= {f"{name}_best_of_3", "alignment_best_of_3"}
    assert (point["protocol"]["best_of"], point["protocol"]["ranked_by"]) == (3, "the evaluated model itself")
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 0, "output_type": "np"}
    for index, prompt in enumerate(PROMPTS):
        names = [str(index), *(f"{index}/{number}" for number in range(1, BEST_OF))]
        images = pipeline.generate([prompt] * BEST_OF, indices=names, **settings)
        best = (255 * images[rows["best_number"][index]]).round().astype(np.uint8)[None]
        features = build_pixel_network(torch.device("cpu"), None).features(best)[0]
        assert abs(features - rows[f"best/features/{NETWORK}"][index]).max() <= 1
    assert rows["best_number"].max() > 0
    assert (rows[f"features/{NETWORK}"] == single_rows[f"features/{NETWORK}"]).all()


def test_images_of_generation_are_chosen_by_another_model(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"^quality\.best_of: 3, .*generation cannot rank images; .*quality\.ranker"):
        measure(folder, "generation", tmp_path, best_of=BEST_OF)
    clip = str(folder / "clip")
    point, rows, _ = measure(folder, "generation", tmp_path, best_of=BEST_OF, ranker=clip)
    assert point["protocol"]["ranked_by"] == clip
    assert any(name.endswith("_best_of_3") for name in point["metrics"])
    assert "alignment" not in point["metrics"], "the ranker does not judge"
    assert len(rows["best_number"]) == len(PROMPTS)
    with pytest.raises(ConfigError, match=r"^quality\.best_of: .*generation cannot rank"):
        measure(folder, "joint", tmp_path, best_of=BEST_OF, ranker=str(folder / "generation"))


def generate(folder, task, output, *arguments):
    settings = ["--num_steps", "2", "--guidance_scale", "1", "--batch_size", "2", "--device", "cpu", "--output_dir", str(output)]
    return run_command("generate", ["--model", str(folder / task), "--captions", *PROMPTS, *settings, *arguments])


@pytest.mark.parametrize(("per_prompt", "best_of"), [(1, 1), (2, 1), (2, 3)])
def test_the_images_of_the_command_are_those_of_a_single_call(folder, tmp_path, per_prompt, best_of):
    assert generate(folder, "joint", tmp_path, f"--num_images_per_prompt={per_prompt}", f"--best_of={best_of}") == 0
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "batch_size": 2}
    pipeline = DiffDisPipeline.from_pretrained(folder / "joint")
    images = pipeline.generate(PROMPTS, num_images_per_prompt=per_prompt, best_of=best_of, **settings)
    names = json.loads((tmp_path / "captions.json").read_text())
    assert list(names.values()) == [prompt for prompt in PROMPTS for _ in range(per_prompt)]
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(Image.open(tmp_path / name), image)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "captions.json", "grid.png"}


def test_an_interrupted_generation_leaves_the_first_images(folder, tmp_path, monkeypatch, capsys):
    put, calls = storage.put_folder, count()
    monkeypatch.setattr(storage, "put_folder", lambda *arguments: put(*arguments) if next(calls) == 0 else interrupt())

    def interrupt():
        raise KeyboardInterrupt

    assert generate(folder, "generation", tmp_path) == 1
    assert "output_dir" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"000000.png", "000001.png", "captions.json", "grid.png"}


@pytest.mark.parametrize(
    ("task", "arguments", "word"), [("generation", ["--height", "15"], "height: 15"), ("clip", [], "trained for clip")]
)
def test_images_that_a_model_cannot_generate_are_one_line(folder, tmp_path, capsys, task, arguments, word):
    assert generate(folder, task, tmp_path, *arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]  # after the bar of transformers
    assert line.startswith(f"error: {folder / task}: ")
    assert word in line
