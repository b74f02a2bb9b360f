"""A resumed run reports what changed, joins two learning-rate schedules, and does nothing when it is complete."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run
from ray_platform.train.optimizer import Rewarm, learning_rate_factor
from ray_platform.train.resuming import Resumption, other_shards, resumed_rewarm
from tests.ray_platform.test_checkpointing import manifest, save
from tests.support.messages import check_message

FINISHED = {"num_steps": 100, "warmup_steps": 10, "lr_schedule": "cosine", "rewarm_steps": 0}


def resumption(step=100, config=None, folder="/run", **fields):
    return Resumption(f"{folder}/checkpoints/a/step", manifest(step, config=config or {"train": FINISHED}, **fields))


def factors(steps, train, rewarm):
    return [learning_rate_factor(train, step, rewarm) for step in steps]


def test_each_changed_setting_is_reported(capsys):
    saved = {"objective": {"lr_unet": 1e-4, "lambda_alignment": 1.0, "freeze": []}, "train": FINISHED | {"resume": "none"}}
    current = {
        "objective": {"lr_unet": 2e-4, "lambda_alignment": 1.0, "freeze": ("unet.*",)},
        "train": FINISHED | {"resume": "auto", "micro_batch_size": 8},
    }
    changed = resumption(config=saved)
    assert changed.changes(current) == [
        "objective.lr_unet: was 0.0001, is 0.0002",
        'objective.freeze: was [], is ["unet.*"]',
        "train.micro_batch_size: was absent, is 8",
    ]
    check_message("a resume with another learning rate", changed.changes(current)[0])
    (tag,) = changed.report(current, TrainConfig(**FINISHED)).items()
    assert tag == ("changed_at_step_100", "; ".join(changed.changes(current)))
    assert capsys.readouterr().out.count(": was ") == 3
    assert changed.report(saved, TrainConfig(**FINISHED)) == {}
    assert capsys.readouterr().out == ""


def test_a_finished_run_with_more_steps_jumps_or_rises():
    """The cosine of 100 steps ends near 0; that of 200 is at half of the peak there."""
    jumping, rising = (TrainConfig(**FINISHED | {"num_steps": 200, "rewarm_steps": steps}) for steps in (0, 20))
    old = resumption()
    assert resumed_rewarm(old.manifest, rising) == Rewarm(100, pytest.approx(0.0003, abs=1e-4))
    profiled = replace(rising, profile=True, profile_steps=(150, 155))
    assert resumed_rewarm(old.manifest, profiled) == resumed_rewarm(old.manifest, rising), (
        "these steps are not in the old schedule"
    )
    (line,) = old.warnings(jumping)
    assert line.startswith("train.rewarm_steps")
    assert "step 100" in line
    check_message("a finished run is resumed with twice the steps", line)
    assert old.warnings(rising) == []
    rewarm = resumed_rewarm(old.manifest, rising)
    values = factors(range(100, 130), rising, rewarm)
    assert values[0] == pytest.approx(0.028, abs=0.003)
    assert max(b - a for a, b in itertools.pairwise(values)) < 0.03
    assert values[19:] == factors(range(119, 130), rising, None)
    # A restart in the middle of the rise continues it, with its own checkpoint and settings.
    middle = resumption(110, {"train": FINISHED | {"num_steps": 200, "rewarm_steps": 20}}, rewarm={"step": 100, "factor": 0.0003})
    assert resumed_rewarm(middle.manifest, rising) == Rewarm(100, 0.0003)
    assert middle.warnings(rising) == []


def test_a_changed_learning_rate_starts_at_the_one_at_which_the_run_stopped():
    train = TrainConfig(**FINISHED | {"num_steps": 200, "lr_schedule": "constant", "rewarm_steps": 10})
    saved = {"train": FINISHED | {"num_steps": 200, "lr_schedule": "constant", "rewarm_steps": 10}}
    before, after = {"unet": 1e-5, "new": 1e-3, "off": 1e-4}, {"unet": 1e-4, "new": 1e-3, "off": 0.0, "added": 1e-2}

    def rates(rewarm, peaks, steps):
        return {name: [peak * learning_rate_factor(train, n, rewarm, name) for n in steps] for name, peak in peaks.items()}

    def resume(step, current, **fields):
        return resumed_rewarm(resumption(step, saved, **fields).manifest, train, current)

    rewarm = resume(50, after, peaks=before)
    found = rates(rewarm, after, range(50, 65))
    assert found["unet"] == pytest.approx([1e-5 + 9e-6 * min(n, 10) for n in range(1, 16)])
    assert (found["new"], found["off"], found["added"]) == ([1e-3] * 15, [0.0] * 15, [1e-2] * 15)
    stored = json.loads(json.dumps(asdict(rewarm)))
    assert rates(resume(55, after, peaks=after, rewarm=stored), after, range(55, 65)) == rates(rewarm, after, range(55, 65))
    lowered = rates(resume(55, before, peaks=after, rewarm=stored), before, (55, 64))["unet"]
    assert lowered == pytest.approx([found["unet"][4] * 0.9 + 1e-6, 1e-5]), "from the middle of the rise"
    for unchanged in ({"peaks": before}, {}):
        assert resume(50, before, **unchanged) is None
    assert resume(50, after) is None, "a checkpoint of a release before does not have them"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"lr_schedule": "constant"}, [1] * 7),
        ({"lr_schedule": "linear"}, [1, 1 - 1 / 9, 1 - 2 / 9, 1 - 3 / 9, 0.5, 0, 0]),
        ({"lr_schedule": "linear", "min_lr_factor": 0.2}, [1, 1 - 0.8 / 9, 1 - 1.6 / 9, 1 - 2.4 / 9, 0.6, 0.2, 0.2]),
        ({"lr_schedule": "cosine", "min_lr_factor": 0.2}, [1, 0.9759, 0.9064, 0.8, 0.6, 0.2, 0.2]),
        ({"lr_schedule": "wsd", "cooldown_steps": 60}, [1, 1, 1, 1, 1 - (15 / 60) ** 0.5, 0, 0]),
        ({"lr_schedule": "wsd", "cooldown_steps": 60, "min_lr_factor": 0.5}, [1, 1, 1, 1, 0.75, 0.5, 0.5]),
    ],
)
def test_schedules_after_the_warm_up(fields, expected):
    train = TrainConfig(num_steps=100, warmup_steps=10, **fields)
    assert factors(range(10), train, None) == [(step + 1) / 10 for step in range(10)]
    assert factors((10, 20, 30, 40, 55, 100, 120), train, None) == pytest.approx(expected, abs=1e-4)


def test_a_checkpoint_without_new_fields_of_the_schedule_had_their_defaults():
    assert resumed_rewarm(resumption(50).manifest, TrainConfig(**FINISHED)) is None
    changed = resumed_rewarm(resumption(50).manifest, TrainConfig(**FINISHED, min_lr_factor=0.5))
    assert changed.step == 50
    cooling = TrainConfig(**FINISHED | {"lr_schedule": "wsd", "num_steps": 70, "cooldown_steps": 20}, min_lr_factor=0.1)
    constant = resumption(50, {"train": FINISHED | {"lr_schedule": "wsd", "cooldown_steps": 10}})
    assert resumed_rewarm(constant.manifest, cooling) == Rewarm(50, 1.0)
    assert constant.warnings(cooling) == [], "a branch that cools down from the constant phase"
    (line,) = constant.warnings(replace(cooling, cooldown_steps=30))
    assert line.startswith("train.cooldown_steps: ")
    assert line.endswith("use 20")


@pytest.mark.parametrize("changes", [{}, {"rewarm_steps": 0}, {"num_steps": 90}, {"num_steps": 101, "lr_schedule": "linear"}])
def test_a_schedule_without_a_jump_is_not_reported(changes):
    assert resumption(50 if not changes else 100).warnings(TrainConfig(**FINISHED | changes)) == []


def test_a_run_is_complete_when_its_summary_is_that_of_the_last_step(tmp_path):
    done, train = resumption(folder=tmp_path), TrainConfig(**FINISHED)
    assert done.completed(train, str(tmp_path)) == "", "it has still to export"
    (tmp_path / "train_summary.json").write_text(json.dumps({"num_steps": 100}))
    line = done.completed(train, str(tmp_path))
    assert line.startswith("output_dir: ")
    check_message("a complete run is started again", line, OUTPUT_DIR=tmp_path)
    assert done.completed(TrainConfig(**FINISHED | {"num_steps": 200}), str(tmp_path)) == ""
    assert resumption(50, folder=tmp_path).completed(train, str(tmp_path)) == ""
    assert resumption(folder="/other").completed(train, str(tmp_path)) == "", "it starts from another run's checkpoint"
    (tmp_path / "train_summary.json").write_text(json.dumps({"num_steps": 50}))
    assert done.completed(train, str(tmp_path)) == ""
    (tmp_path / "train_summary.json").write_text('{"num_ste')
    with pytest.raises(DataError, match=r"train_summary\.json: is not a JSON object"):
        done.completed(train, str(tmp_path))


def test_weights_of_another_run_start_anew(tmp_path):
    url, _ = save(tmp_path / "other", 10)
    full = TrainConfig(resume=url)
    assert Resumption.find(full, str(tmp_path / "run")).url == url
    assert Resumption.find(TrainConfig(resume=f"{url}/", resume_weights_only=True), str(tmp_path / "run")) is None
    own, _ = save(tmp_path / "run", 5)
    for resume in ("auto", url):
        restarted = TrainConfig(resume=resume, resume_weights_only=True)
        assert Resumption.find(restarted, str(tmp_path / "run")).url == own, "its own checkpoints are continued"
    with pytest.raises(ConfigError, match=r"train\.resume_weights_only"):
        TrainConfig(resume_weights_only=True)
    assert isinstance(other_shards(url), DataError)
    check_message("--resume PATH with other shards", other_shards(url), PATH=url)


def test_the_same_command_with_a_path_continues_its_run_and_no_other(tmp_path, shard_folder):
    output, data = str(tmp_path / "run"), DataConfig(sources=(str(shard_folder),))
    digest = build_catalog(data).digest
    path, _ = save(tmp_path / "other", 10, source_digest=digest)

    def dry_run(resume, **fields):
        run = Run(dict, data, TrainConfig(resume=resume, **fields), TrackingConfig(), output, {}, dict)
        return run.dry_run()["starts_from"]

    with pytest.raises(ConfigError, match=r"train\.resume_weights_only: .*--resume PATH"):
        dry_run("auto", resume_weights_only=True)
    assert dry_run(path) == path
    first, _ = save(output, 20, launch="b", source_digest=digest, config={"train": {"resume": f"{path}/"}})
    for fields in ({}, {"resume_weights_only": True}):
        assert dry_run(path, **fields) == dry_run("auto", **fields) == first
    newest, _ = save(output, 30, launch="c", source_digest=digest, config={"train": {"resume": "none"}})
    assert (dry_run(first), dry_run("auto")) == (first, newest), "a branch in the same folder"
    with pytest.raises(ConfigError, match=r"output_dir: .*step_00000030.*--resume auto"):
        dry_run(path)
