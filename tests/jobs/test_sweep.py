"""jobs/sweep.py: trial configurations, checks before the start, sweeps of older releases, and real trials in MLflow (slow)."""

import dataclasses
import functools
import json
from pathlib import Path

import pytest
import ray
from mlflow import MlflowClient
from mlflow.pyfunc import load_model

from diffdis.config import ObjectiveConfig
from diffdis_platform.cli import run_command
from diffdis_platform.commands.sweep import parse_arguments as parse
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.sweeping import (
    TrialRunner,
    configure,
    format_trials,
    open_space,
    plan_sweep,
    rebuild_report,
    run_sweep,
    settings,
    training_steps,
    trial_resources,
)
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.config import DataConfig
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.sweep import TrialSegment
from ray_platform.tracking import TrackingConfig
from ray_platform.train import checkpoint_format
from ray_platform.train.config import TrainConfig
from tests.support.evaluation_sets import picture, write_wds
from tests.support.training import write_shards

DETAILS = Path(__file__).parents[1] / "fixtures" / "reports" / "sweep.json"  # written by release ba8fcc6
COLORS = ("red", "blue", "gold", "pink", "grey")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training shards, a set for zero-shot accuracy, a set for retrieval, and prompts."""
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "train", num_shards=2, samples_per_shard=16)
    labels = [i % 5 for i in range(20)]
    write_wds(root, "mine", [picture(i) for i in range(20)], labels=labels, classes=COLORS, templates=["a {c}."])
    write_wds(root, "pairs", [picture(100 + i) for i in range(12)], captions=[[f"picture {i}"] for i in range(12)])
    (root / "both.yaml").write_text("sets: [mine, pairs]\n")
    (root / "prompts.txt").write_text("".join(f"a {color} {i}\n" for i in range(2) for color in COLORS))
    return root


@pytest.fixture
def make(data, tiny_model, tmp_path):
    """Return make(**SweepConfig fields), which builds a sweep with four steps per trial."""
    pretrain = PretrainConfig(
        model=tiny_model,
        objective=ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3),
        data=DataConfig(sources=(str(data / "train"),), image_size=tiny_model.image_size),
        train=TrainConfig(micro_batch_size=4, warmup_steps=1, log_every=1, preview_every=0, cpus_per_worker=0.5, max_failures=0),
    )
    evaluation = EvalConfig(
        suite=str(data / "both.yaml"),
        data_roots=(str(data),),
        scoring=ScoringConfig(num_steps=1),
        quality=QualityConfig(prompts=str(data / "prompts.txt"), reference=str(data / "wds_mine"), num_steps=1),
    )
    space = {
        "objective.lambda_alignment": {"values": [0.5, 1.0]},
        "evaluation.quality.guidance_scales": {"values": [1.5, 3]},
    }
    base = SweepConfig(
        output_dir=str(tmp_path / "sweep"), pretrain=pretrain, evaluation=evaluation, space=space, search="grid", num_trials=0,
        samples=16, num_milestones=2,
    )  # fmt: skip
    return functools.partial(dataclasses.replace, base)


@pytest.mark.slow
def test_a_grid_with_asha_from_its_config_to_mlflow(ray_cluster, make, tmp_path, monkeypatch):
    config = make()
    details = run_sweep(plan_sweep(config, "tiny"), "yaml: 1\n", "python jobs/sweep.py …")
    assert ray.util.placement_group_table() == {} or all(
        group["state"] == "REMOVED" for group in ray.util.placement_group_table().values()
    )
    trials = details["trials"]
    assert [trial["name"] for trial in trials] == ["trial_000", "trial_001", "trial_002", "trial_003"]
    assert trials[0]["default"]
    assert trials[0]["values"] == {"objective.lambda_alignment": 1.0, "evaluation.quality.guidance_scales": 3.0}
    assert trials[0]["state"] == "finished"
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    assert [entry["step"] for entry in trials[0]["history"]] == [2, 4]
    assert [entry["samples"] for entry in trials[0]["history"]] == [8, 16]
    wanted = {"accuracy", "fd_efficientnet_lite0", "kid_efficientnet_lite0", "retrieval_recall_at_1", "alignment"}
    assert wanted <= trials[0]["metrics"].keys()
    assert "eval/mine/acc1" in trials[0]["metrics"]
    finished = {trial["name"] for trial in trials if trial["state"] == "finished"}
    assert set(details["front"]) <= finished
    assert set(details["best"]) == {"accuracy", "fd_efficientnet_lite0"}
    saved = json.loads((tmp_path / "sweep" / "details.json").read_text())
    assert saved["trials"] == json.loads(json.dumps(trials))
    assert "recipe's values" in format_trials(details)
    assert "trial_003" in (tmp_path / "sweep" / "report.html").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/sweep/mlflow.db")  # the store that resolves models:/ URIs
    _check_mlflow(config, details)

    again = run_sweep(plan_sweep(config, "tiny"), "yaml: 1\n", "python jobs/sweep.py …")
    assert [t["metrics"] for t in again["trials"]] == [t["metrics"] for t in trials], "a finished sweep does not run again"
    client = MlflowClient(f"sqlite:///{tmp_path}/sweep/mlflow.db")
    versions = client.search_model_versions("name='diffdis-sweep'")
    assert len(versions) == len({*details["front"], *details["best"].values()}), "its models are not registered again"
    with pytest.raises(ConfigError, match=r"samples: 20, but the sweep in .* was started with 16"):
        plan_sweep(make(samples=20), "tiny")


def write_settings(config, **fields):
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    saved = json.loads(settings(config)) | fields
    (folder / "sweep.json").write_text(json.dumps({name: value for name, value in saved.items() if value is not None}))
    return saved


def test_a_sweep_is_resumed_by_code_with_new_fields(make):
    """A field that did not exist when the sweep was started has its default value."""
    config = make()
    pretrain = write_settings(config)["pretrain"]
    del pretrain["train"]["ema_decay"]
    write_settings(config, pretrain=pretrain)
    assert rebuild_report(config.output_dir) is None
    plan_sweep(config, "tiny")
    pretrain["train"]["old_field"] = 0.1
    write_settings(config, pretrain=pretrain)
    with pytest.raises(ConfigError, match=r"pretrain.train.old_field: absent, but the sweep in .* was started with 0.1"):
        plan_sweep(config, "tiny")


def test_a_sweep_of_another_version_is_shown_if_it_finished_and_rejected_if_not(make):
    config = make()
    assert rebuild_report(config.output_dir) is None, "no sweep yet"
    for fields in ({"format_version": None, "ray_version": None}, {"ray_version": "2.0.0"}):
        write_settings(config, **fields)
        with pytest.raises(ConfigError, match=r"output_dir: .*unfinished sweep of another version.*; finish it"):
            rebuild_report(config.output_dir)
    details = json.loads(DETAILS.read_text())
    Path(config.output_dir, "details.json").write_text(json.dumps(details))
    assert rebuild_report(config.output_dir) == details
    assert "trial_015" in Path(config.output_dir, "report.html").read_text()
    assert "trial_015" in format_trials(details)


def _check_mlflow(config, details):
    tracked = json.loads((Path(config.output_dir) / "mlflow.json").read_text())
    client = MlflowClient(tracked["tracking_uri"])
    parent = client.get_run(tracked["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["samples"] == "16"
    artifacts = {file.path for file in client.list_artifacts(tracked["run_id"])}
    assert {"details.json", "report.html", "pareto.svg", "parallel_coordinates.svg", "learning_curves.svg"} <= artifacts
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{tracked['run_id']}'")
    assert {child.info.run_id for child in children} == {trial["run_id"] for trial in details["trials"]}
    by_id = {child.info.run_id: child for child in children}
    for trial in details["trials"]:
        child = by_id[trial["run_id"]]
        assert child.info.run_name == trial["name"]
        assert child.info.status == "FINISHED"
        assert float(child.data.params["objective.lambda_alignment"]) == trial["values"]["objective.lambda_alignment"]
        assert child.data.metrics["sweep/accuracy"] == trial["metrics"]["accuracy"]
        assert {m.step for m in client.get_metric_history(trial["run_id"], "train/loss_alignment")} == set(
            range(1, trial["history"][-1]["step"] + 1)
        )
    versions = {version.tags["trial"]: version for version in client.search_model_versions("name='diffdis-sweep'")}
    assert set(versions) == {*details["front"], *details["best"].values()}
    best = versions[details["best"]["accuracy"]]
    assert "best accuracy" in best.tags["roles"]
    assert best.run_id in by_id
    embedded = load_model(f"models:/diffdis-sweep/{best.version}").predict({"caption": "red heart"}, {"task": "embed"})
    assert len(embedded["embedding"][0]) == 32


@pytest.mark.slow
def test_a_segment_of_a_trial_is_a_training_and_an_evaluation(ray_cluster, make, tmp_path):
    """Runs without Ray Tune."""
    config = make()
    runner = TrialRunner(config, "tiny", TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "diffdis", parent_run_id="parent"))
    values = {"objective.lambda_alignment": 0.5, "evaluation.quality.guidance_scales": 1.5}
    segment = TrialSegment("trial_001", values, str(tmp_path / "sweep" / "trials" / "trial_001_abc"), "", 0.5)
    result = runner(segment)
    assert (result.step, result.samples) == (2, 8)
    assert checkpoint_format.read_manifest(result.checkpoint).config["objective"]["lambda_alignment"] == 0.5
    metrics = result.metrics
    assert metrics["fd_efficientnet_lite0"] == metrics["eval/fd_efficientnet_lite0/guidance_1.5"]
    assert metrics["accuracy"] == metrics["eval/mine/acc1"]
    assert (tmp_path / "sweep" / "reference_efficientnet_lite0_16px.npz").exists(), "other trials read it"
    next_segment = runner.pretrain_config(dataclasses.replace(segment, budget_fraction=1.0)).train
    assert (next_segment.num_steps, next_segment.stop_at_step, next_segment.resume) == (4, 4, "auto")
    clone = dataclasses.replace(segment, folder=str(tmp_path / "sweep/trials/trial_001_def"), origin=result.checkpoint)
    assert runner.pretrain_config(clone).train.resume == result.checkpoint


def test_trials_share_the_sampled_reference_of_the_first_one(make, tmp_path):
    quality = dataclasses.replace(make().evaluation.quality, num_reference=10)
    config = make(evaluation=dataclasses.replace(make().evaluation, quality=quality))
    runner = TrialRunner(config, "tiny", TrackingConfig())
    segment = TrialSegment("trial_001", {"evaluation.quality.guidance_scales": 1.5}, str(tmp_path / "trial"), "", 0.5)
    first, shared = runner.evaluation_config(segment, 2)
    assert first.quality == dataclasses.replace(quality, guidance_scales=(1.5,))
    storage.write_bytes(shared, b"")
    second = runner.evaluation_config(segment, 4)[0].quality
    assert (second.reference, second.num_reference) == (shared, 0)
    with pytest.raises(ConfigError, match=r"space.evaluation.quality.num_reference: the sweep sets it"):
        open_space(make(space={"evaluation.quality.num_reference": {"values": [10, 20]}}))


@pytest.mark.slow
def test_a_failing_trial_is_a_line_of_the_results(ray_cluster, make):
    config = make(space={"objective.task": {"values": ["joint", "generation"]}}, scheduler="none", num_milestones=1)
    details = run_sweep(plan_sweep(config, "tiny"), "", "")
    assert [(trial["name"], trial["state"]) for trial in details["trials"]] == [
        ("trial_000", "finished"),
        ("trial_001", "failed"),
    ]
    assert details["trials"][1]["error"].startswith("objectives: accuracy was not measured; use one of ")


def test_any_field_can_be_set_as_on_the_command_line(make):
    config = make()
    values = {
        "model.query_visibility": "joint",
        "objective.freeze": ["unet.down_blocks.*"],
        "train.seed": 7,
        "evaluation.quality.guidance_scales": 2.5,
        "evaluation.scoring.num_draws": 3,
    }
    pretrain, evaluation = configure(config, values)
    assert pretrain.model.query_visibility == "joint"
    assert pretrain.objective.freeze == ("unet.down_blocks.*",)
    assert pretrain.train == dataclasses.replace(config.pretrain.train, seed=7)
    assert evaluation.quality.guidance_scales == (2.5,)
    assert evaluation.scoring == ScoringConfig(num_steps=1, num_draws=3)
    assert configure(config, {}) == (config.pretrain, config.evaluation)
    _, default = open_space(make(space={f: {"values": [v]} for f, v in values.items()}))
    assert default == {
        "model.query_visibility": "one_way",
        "objective.freeze": [],
        "train.seed": 0,
        "evaluation.quality.guidance_scales": 3.0,
        "evaluation.scoring.num_draws": 1,
    }


def test_a_range_of_a_float_field_has_floats(make):
    space, _ = open_space(make(space={"objective.temperature": {"low": 1, "high": 2}, "train.seed": {"low": 1, "high": 2}}))
    assert (space["objective.temperature"].is_integer, space["train.seed"].is_integer) == (False, True)


def refusal(config):
    with pytest.raises((ConfigError, DataError)) as error:
        plan_sweep(config, "tiny")
    assert "\n" not in str(error.value)
    return str(error.value)


VALUES = {"values": [1, 2]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"space": {"objective.lambda_alignmnt": VALUES}}, "did you mean --objective.lambda_alignment?"),
        ({"space": {"objective.temperature": {"values": ["warm"]}}}, "space.objective.temperature"),
        ({"space": {"model.schedule.gamma": {"low": 0.1, "high": 2.0}}}, "is not in (0, 1]"),
        ({"space": {"train.num_steps": VALUES}}, "space.train.num_steps: the sweep sets it"),
        ({"space": {"tracking.uri": VALUES}}, "space.tracking.uri: the sweep sets it"),
        ({"space": {"objective.temperature": {"low": 0.1, "high": 0.2}}}, "a grid has values, not a range"),
        ({"samples": 3}, "samples: 3 is less than a step's 4"),
        ({"samples": 4, "num_milestones": 4}, "less than a step to the first"),
        ({"num_trials": 3}, "num_trials: 3, but the grid has 4 points"),
    ],
)
def test_an_invalid_sweep_is_rejected_in_one_line_before_anything_starts(make, tmp_path, fields, words):
    assert words in refusal(make(**fields))
    assert not (tmp_path / "sweep").exists(), "nothing was written"


def test_a_dry_run_says_what_would_run_and_is_a_configuration(data, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--search", "grid", "--num_trials", "0", "--samples", "1e3", "--dry-run"]
    arguments += ["--space", '{"objective.lambda_alignment": {"values": [0.5, 1.0]}}', "--objectives", '{"accuracy": "max"}']
    arguments += ["--pretrain.data.sources", str(data / "train"), "--evaluation.data_roots", str(data)]
    arguments += ["--evaluation.suite", str(data / "both.yaml"), "--evaluation.quality.prompts", ""]
    assert run_command("sweep", arguments) == 0
    printed = capsys.readouterr().out
    described = json.loads("".join(line[2:] for line in printed.splitlines() if line.startswith("# ")))
    assert described == {"trials": 3, "samples_per_trial": 1000, "first_trial": {"objective.lambda_alignment": 0.02}}
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.yaml").write_text(printed)
    for again in (["--config", str(tmp_path / "config.yaml"), "--seed", "5"], ["--seed=5", f"--config={tmp_path}/config.yaml"]):
        command = parse(again)
        assert command.config == dataclasses.replace(parse(arguments).config, seed=5)
        assert not command.switches, "the next run is not a dry one"
    assert parse(["--dry-run", *again]).switches == {"dry_run"}


def test_missing_data_and_unmeasured_objectives_are_rejected_in_one_line(make, tmp_path):
    pretrain, evaluation = make().pretrain, make().evaluation
    elastic = dataclasses.replace(pretrain, train=TrainConfig(num_workers=(1, 2)))
    assert "a sweep's trials have a fixed number of workers" in refusal(make(pretrain=elastic))
    nowhere = dataclasses.replace(pretrain, data=DataConfig(sources=(str(tmp_path / "none"),), image_size=16))
    assert str(tmp_path / "none") in refusal(make(pretrain=nowhere))
    assert "none.yaml" in refusal(make(evaluation=dataclasses.replace(evaluation, suite="none.yaml")))
    unmeasured = make(evaluation=dataclasses.replace(evaluation, quality=QualityConfig()))
    assert "objectives: fd_efficientnet_lite0 needs evaluation.quality.prompts" in refusal(unmeasured)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheduler": "pbt", "search": "optuna", "num_trials": 4}, "search: optuna proposes"),
        ({"search": "random", "num_trials": 1}, "num_trials: 1"),
        ({"space": {}}, "space and objectives"),
        ({"reduction": 1}, "reduction: at least 2"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_rejected(fields, words):
    with pytest.raises(ConfigError, match=words):
        SweepConfig(**fields)


def test_resources_and_steps_of_a_trial(make):
    config = make()
    assert trial_resources(config) == [ResourceRequest({}, {"CPU": 1.0, "GPU": 0.0})]
    wide = dataclasses.replace(config.pretrain, train=dataclasses.replace(config.pretrain.train, num_workers=3))
    assert trial_resources(make(pretrain=wide)) == [ResourceRequest({}, {"CPU": 3.0, "GPU": 0.0})], (
        "3 x 0.5 of workers and 3 x 2 x 0.25 of reads"
    )
    assert training_steps(config.pretrain, 19) == 4
    assert training_steps(dataclasses.replace(config.pretrain, train=TrainConfig(global_batch_size=8)), 19) == 2


@pytest.mark.parametrize("name", ["demo_sweep", "sd_v1_laion_sweep"])
def test_recipes_and_overrides_are_parsed_from_the_command_line(name, tmp_path):
    arguments = ["--recipe", name, "--output_dir", str(tmp_path), "--samples", "4096", "--pretrain.train.seed", "5"]
    arguments += ["--space", '{"objective.temperature": {"low": 0.05, "high": 0.1}}', "--objectives", '{"accuracy": "max"}']
    arguments += ["--pretrain.data.sources", "/data/shards"]
    command = parse(arguments)
    assert (command.config.samples, command.config.pretrain.train.seed) == (4096, 5)
    assert command.config.space == {"objective.temperature": {"low": 0.05, "high": 0.1}}
    assert command.config.objectives == {"accuracy": "max"}
    assert command.config.pretrain.data.sources == ("/data/shards",)
    (tmp_path / "config.yaml").write_text(command.yaml)
    assert parse(["--config", str(tmp_path / "config.yaml")]).config == command.config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "none"], "no such recipe; choose one of demo_sweep, sd_v1_laion_sweep"),
        ([], "output_dir: empty; give an absolute folder"),
        (["--output_dir", "/x", "--search", "bayes"], "search"),
        (["--output_dir", "/x", "--pretrain.output_dir", "/y"], "pretrain.output_dir: is set by the sweep; use output_dir"),
        (["--output_dir", "/x", "--pretrain.tracking.experiment", "y"], "pretrain.tracking: is set by the sweep; use tracking"),
        (["--output_dir", "/x", "--pretrain.train.resume", "auto"], "pretrain.train.resume: is set by the sweep"),
        (["--output_dir", "/x", "--pretrain.train.stop_at_step", "9"], "pretrain.train.stop_at_step: is set by the sweep"),
        (["--output_dir", "/x", "--pretrain.train.max_minutes", "9"], "pretrain.train.max_minutes: .*not the sweep; leave"),
        (["--output_dir", "/x", "--evaluation.checkpoint", "/y"], "evaluation.checkpoint: is set by the sweep"),
        (["--output_dir", "/x", "--evaluation.steps", "all"], "evaluation.steps: is set by the sweep"),
        (["--output_dir", "/x", "--objectives", '{"accuracy": "most"}'], "objectives"),
    ],
)
def test_a_wrong_command_line_is_rejected_in_one_line(arguments, words):
    with pytest.raises(ConfigError, match=f"^[^\n]*{words}[^\n]*$"):
        parse(arguments)
