"""What an evaluation measures: the checkpoints of a run, the sets of a suite, and their class names and templates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, suite_sets
from diffdis_platform.evaluation import quality, run
from diffdis_platform.evaluation.datasets import open_sets
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.run import configs_of_steps
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.sets import read_slice
from tests.support.evaluation_sets import write_own, write_retrieval

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("steps", "expected"), [("all", [20, 40, 60]), ("every:40", [40])])
def test_the_checkpoints_of_a_run_by_step(tmp_path, steps, expected):
    """Of equal steps, after a resume, it is the newest one."""
    write_checkpoints(tmp_path, [("a", 20), ("a", 40), ("b", 40), ("b", 60)])
    config = EvalConfig(checkpoint=str(tmp_path), steps=steps, name="mine")
    configs = configs_of_steps(config)
    assert [each.name for each in configs] == [f"mine-step-{step}" for step in expected]
    assert "/b/step_00000040" in " ".join(each.checkpoint for each in configs)
    assert {each.steps for each in configs} == {""}
    with pytest.raises(ConfigError, match=r"steps: every:7 selects no checkpoint of .*; it has those of steps 20, 40, 60"):
        configs_of_steps(replace(config, steps="every:7"))


def test_checkpoints_share_the_sets_and_no_failures(tmp_path, monkeypatch):
    def evaluate_one(config, plan, earlier=()):
        plan.failures[config.checkpoint] = f"step {len(earlier)}"
        return {"failures": list(plan.failures.values()), "over_training": [*earlier, "score"]}

    write_checkpoints(tmp_path, [("a", 20), ("a", 40)])
    monkeypatch.setattr(run, "evaluate", evaluate_one)
    monkeypatch.setattr(run, "open_model", lambda config: EvaluationModel("model", "/model", "digest", lambda device: None))
    missing = {"mine": "mine: not found"}
    config = EvalConfig(checkpoint=str(tmp_path), steps="all", output_dir=str(tmp_path / "out"))
    details = run.evaluate_steps(config, ({}, missing))
    assert (details["failures"], details["over_training"]) == (["mine: not found", "step 0", "step 1"], ["score"] * 2)
    assert missing == {"mine": "mine: not found"}


@pytest.mark.parametrize(("num_images", "num_slices"), [(2, 1), (4, 2), (9, 3), (30, 3)])
def test_the_first_prompts_of_a_retrieval_set_are_read(tmp_path, monkeypatch, num_images, num_slices):
    slices = []
    monkeypatch.setattr(quality, "read_slice", lambda part: slices.append(part) or read_slice(part))
    url = str(write_retrieval(tmp_path, "pairs", 9, samples_per_shard=3))
    prompts = quality.read_prompts(QualityConfig(prompts=url, reference=url, num_images=num_images))
    assert prompts == [f"image {number}, caption 0" for number in range(min(num_images, 9))]
    assert len(slices) == num_slices


def write_checkpoints(root, places):
    """Write checkpoints that have a manifest only: (launch, step), the oldest first."""
    origin = ROOT / "tests/fixtures/2026_11_29/checkpoints/20261129-120000-aaaaaa/step_00000020/complete.json"
    manifest = json.loads(origin.read_text())
    for counter, (launch, step) in enumerate(places, start=1):
        folder = root / "checkpoints" / launch / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps(manifest | {"step": step, "counter": counter}))


def test_a_suite_of_named_sets():
    assert suite_sets("vtab/cifar10, flickr30k") == {"vtab/cifar10": "", "flickr30k": ""}
    with pytest.raises(ConfigError, match="suite: vtab/cifar is none of paper, quick, demo, not the name of a known set"):
        suite_sets("vtab/cifar10,vtab/cifar")


def test_class_names_and_templates_by_flag(tmp_path):
    folder = write_own(tmp_path)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    (tmp_path / "templates.txt").write_text("one {c}\ntwo {c}\n")
    texts = {"class_names": str(tmp_path / "names.txt"), "templates": str(tmp_path / "templates.txt")}
    for content in ("mine:", f"mine: {folder}"):
        (tmp_path / "suite.yaml").write_text(f"sets: {{{content}}}\n")
        config = EvalConfig(suite=str(tmp_path / "suite.yaml"), data_roots=(str(tmp_path),), **texts)
        data = open_sets(config)[0]["mine"]
        assert (data.classes, data.templates) == (("ant", "bee", "cat"), ("one {c}", "two {c}"))
        assert {"class_names": data.classes_source, "templates": data.templates_source} == texts
        assert open_sets(replace(config, templates=""))[0]["mine"].templates == ("a {c}",)


def test_class_names_and_templates_by_flag_are_for_one_set_of_classes(tmp_path):
    write_own(tmp_path)
    write_retrieval(tmp_path, "pairs", 2)
    (tmp_path / "names.txt").write_text("ant\n")
    for suite, words in (
        ("[mine, pairs]", "for a suite of one set, but \\S+ has 2"),
        ("[pairs]", "pairs is a set for retrieval"),
    ):
        (tmp_path / "suite.yaml").write_text(f"sets: {suite}\n")
        config = EvalConfig(suite=str(tmp_path / "suite.yaml"), data_roots=(str(tmp_path),))
        for field in ("class_names", "templates"):
            with pytest.raises(ConfigError, match=rf"class_names and templates: {words}"):
                open_sets(replace(config, **{field: str(tmp_path / "names.txt")}))
