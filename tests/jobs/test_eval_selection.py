"""What an evaluation measures: the checkpoints of a run, the sets of a suite, and their class names and templates."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffdis_platform.config.evaluate import EvalConfig, suite_sets
from diffdis_platform.evaluation.datasets import open_sets
from diffdis_platform.evaluation.run import configs_of_steps
from ray_platform.contracts import ConfigError
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


def write_checkpoints(run, places):
    """Write checkpoints that have a manifest only: (launch, step), the oldest first."""
    origin = ROOT / "tests/fixtures/2026_11_29/checkpoints/20261129-120000-aaaaaa/step_00000020/complete.json"
    manifest = json.loads(origin.read_text())
    for counter, (launch, step) in enumerate(places, start=1):
        folder = run / "checkpoints" / launch / f"step_{step:08d}"
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
