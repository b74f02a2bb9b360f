"""jobs/compare.py: remaining runs with simulated ones, and one real comparison (slow)."""

import dataclasses
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from diffdis.config import ObjectiveConfig
from diffdis_platform.cli import run_command
from diffdis_platform.commands.compare import parse_arguments as parse
from diffdis_platform.comparison import run as comparison
from diffdis_platform.comparison.run import compare, plan_comparison
from diffdis_platform.comparison.summary import CLAIM, best_of_differences, confidence_interval, format_summary
from diffdis_platform.config.compare import ARMS, CompareConfig
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import demo_compare
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.config import DataConfig
from ray_platform.lease import Lease
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import Stopped
from tests.support.evaluation_sets import picture, write_wds
from tests.support.training import write_shards

COLORS = ("red", "blue", "gold")
BROKEN = {"broken": {"objective.freeze": ["nothing.*"]}}  # fails when the model is built
NUM_STEPS, BATCH_SIZE = 3, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with training shards, a zero-shot set, a retrieval set and prompts."""
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "train", num_shards=2)
    labels = [i % 3 for i in range(24)]
    write_wds(root, "mine", [picture(i) for i in range(24)], labels=labels, classes=COLORS, templates=["{c}"])
    write_wds(root, "pairs", [picture(100 + i) for i in range(20)], captions=[[f"picture {i}"] for i in range(20)])
    (root / "suite.yaml").write_text("sets: [mine, pairs]\n")
    return root


@pytest.fixture(scope="module")
def config_of(tiny_model, root):
    """Return config_of(output_dir, **fields), which builds a CompareConfig of short runs with one worker."""
    sources, pairs = (str(root / "train"),), str(root / "wds_pairs")
    train = TrainConfig(
        num_steps=NUM_STEPS, micro_batch_size=BATCH_SIZE, log_every=1, preview_every=0, cpus_per_worker=0.5, max_failures=0,
        heldout_sources=sources, heldout_samples=8, heldout_every=2,
    )  # fmt: skip
    objective = ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, num_draws=2)
    data = DataConfig(sources=sources, image_size=tiny_model.image_size)
    evaluation = EvalConfig(
        suite=str(root / "suite.yaml"), data_roots=(str(root),), scoring=ScoringConfig(num_steps=2), num_workers=1,
        cpus_per_worker=0.5, quality=QualityConfig(prompts=pairs, reference=pairs, guidance_scales=(1.0,), num_steps=2),
    )  # fmt: skip

    def make(output_dir, **fields):
        fields = {"arms": ("joint", "generation"), "seeds": (0,)} | fields
        pretrain = PretrainConfig(model=tiny_model, objective=objective, data=data, train=train)
        return CompareConfig(output_dir=str(output_dir), pretrain=pretrain, evaluation=evaluation, **fields)

    return make


def run(config):
    return compare(config, plan_comparison(config), "tiny", "python jobs/compare.py")


def read(config, *parts):
    return json.loads(Path(config.output_dir, *parts).read_text())


def simulated_figures(arm, seed):
    figures = {"samples": 12, "seconds": 2.5, "environment": "4 CPUs"}
    if arm != "generation":
        figures["accuracy"] = 0.25 + 0.125 * seed + 0.125 * (arm == "joint")
    if arm != "alignment":
        figures["fd"] = 50.0 - seed - 4 * (arm == "joint")
    return figures


@pytest.fixture
def measured(monkeypatch):
    """Replace the runs by simulated ones. Returns the list of measured (arm, seed). The arm `broken` fails."""
    measured = []

    def measure(config, identity, arm, seed, recipe, tracking):
        measured.append((arm, seed))
        assert dataclasses.replace(tracking, uri="", run_name="", parent_run_id="") == config.tracking
        if arm == "broken":
            raise ConfigError("objective.freeze: no parameter matches nothing.*")
        figures, url = simulated_figures(arm, seed), Path(config.run_dir(arm, seed), "result.json")
        url.parent.mkdir(parents=True)
        curve = [{"samples": 12, "metrics": {"heldout/acc1": 0.5}}]
        result = {"config": identity, "fields": config.fields_of(arm), "figures": figures, "curve": curve}
        url.write_text(json.dumps(result))
        return figures

    monkeypatch.setattr("diffdis_platform.comparison.run.measure", measure)
    return measured


def test_a_comparison_measures_what_is_missing_and_summarizes_all(measured, config_of, tmp_path):
    tracking = TrackingConfig(tags={"team": "vision"}, log_model=False, registered_model="small", system_metrics_seconds=0.0)
    first = config_of(tmp_path, arms=("joint", "broken"), own_arms=BROKEN, tracking=tracking)
    summary = run(first)
    assert summary["failures"] == ["broken, seed 0: objective.freeze: no parameter matches nothing.*"]
    assert summary["arms"]["broken"]["seeds"] == {}
    assert summary["arms"]["joint"]["std"]["fd"] is None, "one seed has no spread"
    assert summary | {"format_version": 1} == read(first, "summary.json")

    larger = dataclasses.replace(first, arms=("joint", "generation", "alignment"), seeds=(0, 1))
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"arms": {}}))
    del measured[:]
    summary = run(larger)
    assert measured == [("generation", 0), ("alignment", 0), ("joint", 1), ("generation", 1), ("alignment", 1)], (
        "from result.json"
    )
    assert summary["arms"]["joint"]["mean"]["fd"] == 45.5
    difference = {"mean": -4.0, "low": -4.0, "high": -4.0, "n": 2, "detectable": 0.0}
    assert summary["paired"]["fd_joint_minus_generation"] == difference
    assert summary["claim"]["holds"]
    assert f"{CLAIM.holds}: accuracy_joint_minus_alignment is +0.125" in format_summary(summary)
    assert CLAIM.undecided in format_summary(summary | {"paired": {}, "claim": {"holds": False, "why": "not measured: …"}})
    page = (tmp_path / "report.html").read_text()
    assert "generation" in page
    client = MlflowClient(read(larger, "mlflow.json")["tracking_uri"])
    parent = client.get_run(read(larger, "mlflow.json")["run_id"])
    assert parent.data.metrics["paired/fd_joint_minus_generation/mean"] == -4.0
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} >= {"summary.json", "report.html", "config.yaml"}


def test_a_second_comparison_in_an_active_folder_is_rejected(config_of, tmp_path):
    """A sweep takes the lease at the same place."""
    with Lease(str(tmp_path), "first"), pytest.raises(ConfigError, match="in use by launch first"):
        run(config_of(tmp_path))
    assert not (tmp_path / "summary.json").exists()


def test_a_summary_alone_is_enough_to_continue_elsewhere(measured, config_of, tmp_path):
    summary = run(config_of(tmp_path / "first"))
    second = tmp_path / "second"
    second.mkdir()

    def plan(summary, **fields):
        (second / "summary.json").write_text(json.dumps(summary))
        return plan_comparison(config_of(second, **fields))

    extended = {"arms": ("joint", "joint_mask"), "seeds": (0, 1)}
    assert plan(summary, **extended).pending == [("joint_mask", 0), ("joint", 1), ("joint_mask", 1)]
    assert "generation" in plan(summary, arms=("joint",)).results, "arms of earlier calls are kept"
    del summary["config"]["pretrain"]["train"]["ema_decay"]  # a field that was added later; its default (0) is used here
    assert plan(summary).pending == []
    summary["config"]["pretrain"]["train"]["num_steps"] = 4
    with pytest.raises(ConfigError, match=r"^[^\n]*\(pretrain.train.num_steps: 4 there, 3 here\)[^\n]*$"):
        plan(summary)
    summary["config"]["pretrain"]["train"]["num_steps"] = NUM_STEPS
    summary["config"]["arms"]["half"] = {"objective.lambda_alignment": 2.0}
    summary["arms"]["half"] = {"seeds": {}}
    with pytest.raises(ConfigError, match=r"^own_arms.half: [^\n]*$"):
        plan(summary, arms=("joint", "half"), own_arms={"half": {"objective.lambda_alignment": 0.5}})
    with pytest.raises(ConfigError, match=r"^[^\n]*is not a summary of a comparison[^\n]*$"):
        plan({})


def test_a_set_that_changes_between_two_arms_is_noticed(measured, config_of, tmp_path, monkeypatch):
    """Arms that were evaluated on other data cannot be compared, also if names and sizes of the files are the same."""
    simulated = comparison.measure

    def measure(config, identity, arm, seed, recipe, tracking):
        return simulated(config, identity, arm, seed, recipe, tracking) | {"contents": {"mine": arm}}

    monkeypatch.setattr(comparison, "measure", measure)
    summary = run(config_of(tmp_path, arms=("joint", "generation")))
    assert summary["failures"] == [
        "generation, seed 0: mine: its data are not those of joint, seed 0 (content digest generation, not joint); restore them "
        "and repeat the command, or compare in another output_dir"
    ]
    assert summary["arms"]["generation"]["seeds"] == {}
    result = tmp_path / "runs" / "generation_seed0" / "result.json"
    saved = json.loads(result.read_text())
    for contents, pending in (({"mine": "generation"}, [("generation", 0)]), ({"mine": "joint"}, []), ({}, [])):
        result.write_text(json.dumps(saved | {"figures": saved["figures"] | {"contents": contents}}))
        assert plan_comparison(config_of(tmp_path, arms=("joint", "generation"))).pending == pending


def test_seeds_of_choices_are_left_out_of_the_differences_for_good(measured, config_of, tmp_path):
    config = config_of(tmp_path, arms=("joint", "alignment"), seeds=(0, 1, 2), selection_seeds=(0, 9))
    summary = run(config)
    assert (summary["selected_on"], summary["fresh"]) == ([0, 9], [1, 2])
    assert summary["paired"]["accuracy_joint_minus_alignment"]["n"] == 2
    assert list(summary["arms"]["joint"]["seeds"]) == ["0", "1", "2"]
    later = run(dataclasses.replace(config, selection_seeds=()))
    assert later["selected_on"] == [0, 9], "the summary remembers them"
    assert later["paired"] == summary["paired"]
    assert "Without the seeds on which settings were chosen: 0, 9" in (tmp_path / "report.html").read_text()


def test_an_arm_may_be_trained_for_another_number_of_steps(config_of, tmp_path):
    arms = {"clip_equal_seconds": {"objective.task": "clip", "train.num_steps": 9}}
    config = config_of(tmp_path, arms=("clip", "clip_equal_seconds"), own_arms=arms)
    config.check()
    assert config.pretrain_of("clip_equal_seconds", 0).train.num_steps == 9
    assert config.pretrain_of("clip", 0).train.num_steps == NUM_STEPS


def test_the_best_of_several_images_next_to_a_single_one(config_of, tmp_path):
    single = config_of(tmp_path, arms=("joint", "generation", "clip"), seeds=(0, 1))
    assert single.runs()[:2] == [("joint", 0), ("generation", 0)]
    quality = dataclasses.replace(single.evaluation.quality, best_of=4)
    config = dataclasses.replace(single, evaluation=dataclasses.replace(single.evaluation, quality=quality))
    assert config.runs()[:3] == [("joint", 0), ("clip", 0), ("generation", 0)], "the model of clip ranks its images"
    assert config.evaluation_of("joint", 1).quality.ranker == ""
    assert config.evaluation_of("generation", 1).quality.ranker == f"{config.run_dir('clip', 1)}/export"
    assert config.evaluation_of("clip", 1).quality.prompts == ""
    with pytest.raises(ConfigError, match=r"^evaluation\.quality\.best_of: the arm generation cannot rank"):
        dataclasses.replace(config, arms=("joint", "generation")).check()

    results = {
        "joint": {seed: {"fd": 50.0, "kid": 0.5, "fd_best_of_4": 46.0 + seed, "kid_best_of_4": 0.25} for seed in (0, 1, 2)},
        "generation": {0: {"fd": 52.0, "fd_best_of_4": 51.0}},
        "alignment": {0: {"accuracy": 0.5}},
    }
    best_of = best_of_differences(results)["best_of_4"]
    assert best_of["fd_minus_random"] == confidence_interval([-4.0, -3.0, -2.0])
    assert best_of["kid_minus_random"]["mean"] == -0.25
    assert best_of["arms"].keys() == {"joint", "generation"}
    assert best_of["arms"]["generation"] == {"fd_minus_random": confidence_interval([-1.0])}
    assert best_of_differences({"joint": {0: {"fd": 50.0}}}) == {}


def test_sigterm_ends_the_comparison_and_not_only_the_run(config_of, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("stopped by SIGTERM; saved at step 2")

    monkeypatch.setattr("diffdis_platform.comparison.run.measure", stopped)
    with pytest.raises(Stopped):
        run(config_of(tmp_path))
    assert read(config_of(tmp_path), "summary.json")["failures"] == []


class Interrupt(BaseException):
    """Exception that nothing catches, like a signal."""


@pytest.mark.slow
def test_a_real_comparison_that_is_interrupted_after_the_training_of_its_second_run(
    ray_cluster, config_of, tmp_path, monkeypatch
):
    config = config_of(tmp_path, arms=("joint", "generation", "clip", "broken"), own_arms=BROKEN)
    quality = dataclasses.replace(config.evaluation.quality, best_of=2)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, quality=quality))
    evaluate, evaluated = comparison.evaluate, []

    def interrupt(*arguments):
        evaluated.append(arguments)
        if len(evaluated) == 2:
            raise Interrupt
        return evaluate(*arguments)

    monkeypatch.setattr(comparison, "evaluate", interrupt)
    with pytest.raises(Interrupt):
        run(config)
    assert plan_comparison(config).pending == [("clip", 0), ("broken", 0), ("generation", 0)]
    summary = run(config)
    assert len(list(Path(config.output_dir, "runs", "clip_seed0", "checkpoints").iterdir())) == 1, "it is not trained again"
    assert summary["failures"][0].startswith("broken, seed 0: objective.freeze: ")

    joint, generation = (summary["arms"][arm]["seeds"]["0"] for arm in ("joint", "generation"))
    assert {"accuracy", "accuracy_mine", "retrieval_recall_at_1", "image_retrieval_recall_at_1", "fd", "kid"} <= set(joint)
    assert not [name for name in generation if "accuracy" in name or "recall" in name], "absent, not zero"
    for figures in (joint, generation):
        assert figures["samples"] == NUM_STEPS * BATCH_SIZE
        assert figures["seconds"] > 0
        assert figures["flops"] == pytest.approx(figures["flops_per_sample"] * figures["samples"], rel=1e-6)
    assert all(joint[cost] > generation[cost] for cost in ("flops_per_sample", "parameters"))
    assert summary["paired"]["fd_joint_minus_generation"]["mean"] == joint["fd"] - generation["fd"]
    for arm, run_figures in (("joint", joint), ("generation", generation)):
        best_of = summary["best_of_2"]["arms"][arm]
        assert best_of["fd_minus_random"]["mean"] == run_figures["fd_best_of_2"] - run_figures["fd"] != 0
        assert best_of.keys() == {"fd_minus_random", "kid_minus_random"}
    assert "The best of 2 images" in Path(config.output_dir, "report.html").read_text()

    result = read(config, "runs", "joint_seed0", "result.json")
    assert result["figures"] == joint
    assert result["metrics"]["eval/mine/acc1"] == joint["accuracy_mine"]
    assert {"arms": summary["config"]["arms"], **result["config"]} == summary["config"]
    assert [point["samples"] for point in result["curve"]] == [2 * BATCH_SIZE, 3 * BATCH_SIZE]
    assert "heldout/acc1" in result["curve"][0]["metrics"]
    assert "picture 3" in Path(config.output_dir, "report.html").read_text()
    for arm in ("joint", "generation"):
        assert Path(config.output_dir, "samples", f"{arm}_seed0.png").read_bytes().startswith(b"\x89PNG")
    tracked = read(config, "mlflow.json")
    client = MlflowClient(tracked["tracking_uri"])
    experiment = client.get_run(tracked["run_id"]).info.experiment_id
    children = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{tracked['run_id']}'")
    by_name = {child.info.run_name: child for child in children}
    assert by_name.keys() == {"joint seed 0", "generation seed 0", "clip seed 0"}, "the fourth was rejected before it started"
    assert by_name["joint seed 0"].data.metrics["eval/mine/acc1"] == joint["accuracy_mine"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_dir": "x"}, "output_dir: x; give an absolute folder"),
        ({"arms": ("jont",)}, "arms: no such arm .jont.; use joint, generation, alignment, clip, joint_mask, one_way_mask"),
        ({"seeds": (1, 1)}, r"seeds: \[1, 1\]; give at least one"),
        ({"seeds": (-1,)}, "seeds: -1 is below 0"),
        ({"own_arms": {"clip": {}}}, "own_arms: clip is a predefined arm"),
        ({"own_arms": {"a b": {}}}, "own_arms: invalid name 'a b'"),
        ({"selection_seeds": (-1,)}, "selection_seeds: -1 is below 0"),
        ({"arms": ("a",), "own_arms": {"a": {"train.seed": 9}}}, "own_arms.a: train.seed is not a field of model"),
        (
            {"evaluation": EvalConfig(quality=QualityConfig("p", "r", best_of=2, ranker="/x"))},
            "evaluation.quality.ranker: is set by the comparison; use the arm clip",
        ),
        ({"arms": ("a",), "own_arms": {"a": {"objective.lamda": 9}}}, "own_arms.a: --objective.lamda: no such field; did you"),
        ({"arms": ("a",), "own_arms": {"a": {"model.schedule.gamma": 9}}}, "own_arms.a: model.schedule.gamma: 9.0 is not in"),
        ({"pretrain": PretrainConfig(train=TrainConfig(seed=3))}, "pretrain.train.seed: is set by the comparison; use seeds"),
        ({"pretrain": PretrainConfig(output_dir="/x")}, "pretrain.output_dir: is set by the comparison; use output_dir"),
        ({"pretrain": PretrainConfig(train=TrainConfig(max_minutes=9))}, "pretrain.train.max_minutes: .*not the comparison;"),
        ({"evaluation": EvalConfig(steps="all")}, "evaluation.steps: is set by the comparison"),
        ({"evaluation": EvalConfig(name="a")}, "evaluation.name: is set by the comparison"),
    ],
)
def test_invalid_fields_are_rejected_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}[^\n]*$"):
        CompareConfig(**{"output_dir": "/x", **fields}).check()


def test_a_dry_run_lists_the_runs_that_are_left(root, tmp_path, capsys):
    arguments = ["--output_dir", str(tmp_path / "out"), "--arms", "clip", "joint", "--seeds", "0", "3", "--dry-run"]
    arguments += ["--evaluation.suite", str(root / "suite.yaml"), "--evaluation.data_roots", str(root)]
    arguments += ["--pretrain.data.sources", str(root / "train"), "--pretrain.train.heldout_sources", str(root / "train")]
    pairs = str(root / "wds_pairs")
    arguments += ["--evaluation.quality.prompts", pairs, "--evaluation.quality.reference", pairs]
    assert run_command("compare", arguments) == 0
    printed = capsys.readouterr().out
    described = json.loads("".join(line[2:] for line in printed.splitlines() if line.startswith("# ")))
    assert described == {
        "runs": 4,
        "runs_done": 0,
        "runs_left": [f"{arm}, seed {s}" for s in (0, 3) for arm in ("clip", "joint")],
    }
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_misspelled_recipe_and_missing_data_are_rejected_in_one_line(config_of, tmp_path):
    with pytest.raises(ConfigError, match=r"^--recipe demo: no such recipe[^\n]*$"):
        parse(["--output_dir", "/x", "--recipe", "demo"])
    config = config_of(tmp_path)
    no_data = dataclasses.replace(config.pretrain, data=DataConfig(sources=("/none",), image_size=16))
    no_sets = dataclasses.replace(config.evaluation, suite="demo")
    with pytest.raises(DataError, match=r"^[^\n]*/none[^\n]*$"):
        plan_comparison(dataclasses.replace(config, pretrain=no_data))
    with pytest.raises(ConfigError, match=r"^[^\n]*heldout_style: not found below[^\n]*$"):
        plan_comparison(dataclasses.replace(config, evaluation=no_sets))


def test_the_recipe_parses_to_itself_and_arms_differ_only_in_their_fields(tmp_path):
    config = parse(["--demo_data", "/data/demo", "--output_dir", "/x"]).config
    assert config == dataclasses.replace(demo_compare("/data/demo"), output_dir="/x")
    (tmp_path / "part.yaml").write_text("demo_data: /data/demo\noutput_dir: /x")
    assert parse(["--config", str(tmp_path / "part.yaml")]).config == config
    with pytest.raises(ConfigError, match=r"^--demo_data: /other, but --config has /data/demo"):
        parse(["--config", str(tmp_path / "part.yaml"), "--demo_data", "/other"])
    joint = config.pretrain_of("joint", 3)
    assert (joint.train.seed, joint.train.resume, joint.output_dir) == (3, "auto", "/x/runs/joint_seed3")
    for arm in ARMS:
        other = config.pretrain_of(arm, 3)
        assert dataclasses.replace(other, model=joint.model, objective=joint.objective, output_dir=joint.output_dir) == joint
    assert config.evaluation_of("clip", 0).quality.prompts == ""
    assert config.evaluation_of("generation", 0).quality.prompts
