"""Profiles of single steps: which steps they contain, and what happens to those that cannot be recorded or written."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.config import TrainConfig
from ray_platform.train.profiling import StepProfiler


def run_steps(folder: Path, start: int, stop: int, steps: tuple[int, int] | None = None, rank: int = 0) -> None:
    """Run steps of which step n multiplies matrices of n rows."""
    profiler = StepProfiler(TrainConfig(num_steps=100, profile=True, profile_steps=steps), str(folder), rank, start)
    for step in range(start + 1, stop + 1):
        torch.ones(step, 2) @ torch.ones(2, 2)
        profiler.step()
    profiler.stop()


def profiled_steps(file: Path) -> list[int]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::mm"]


@pytest.mark.parametrize(
    ("start", "stop", "steps", "folder", "expected"),
    [
        (0, 10, (3, 4), "steps_3-4", [3, 4]),
        (0, 10, (1, 1), "steps_1-1", [1]),
        (0, 10, (2, 2), "steps_2-2", [2]),
        (6, 12, None, "steps_11-13", [11, 12]),  # the run ends before the profile
        (40, 44, (30, 42), "steps_41-42", [41, 42]),  # it resumes within the profile
    ],
)
def test_a_profile_contains_the_steps_that_were_asked_for(tmp_path, start, stop, steps, folder, expected):
    run_steps(tmp_path, start, stop, steps, rank=3)
    [file] = tmp_path.glob("profile/*/*.json.gz")
    assert (file.parent.name, file.name) == (folder, "rank_00003.json.gz")
    assert profiled_steps(file) == expected
    table = (file.parent / "rank_00003.txt").read_text()
    assert "aten::mm" in table
    assert "CPU Mem" in table


def test_a_profile_before_the_step_from_which_a_run_resumes_is_a_warning(tmp_path, caplog):
    run_steps(tmp_path, 50, 52, (3, 4))
    assert not (tmp_path / "profile").exists()
    assert "train.profile_steps" in caplog.text


def test_a_profile_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("no folder")
    run_steps(tmp_path, 0, 8)
    assert "could not be written; training continues" in caplog.text


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"profile_steps": (0, 3)}, "profile_steps"),
        ({"profile_steps": (4, 3)}, "profile_steps"),
        ({"profile_steps": (90, 101)}, "profile_steps"),
        ({"profile_steps": (3, 4), "profile": False}, "profile_steps"),
        ({"profile_ranks": (0, 2)}, "profile_ranks"),
        ({"profile_ranks": ()}, "profile_ranks"),
    ],
)
def test_steps_and_ranks_that_do_not_exist_are_rejected(settings, field):
    with pytest.raises(ConfigError, match=rf"train.{field}: "):
        TrainConfig(**{"num_steps": 100, "num_workers": 2, "profile": True, **settings})
