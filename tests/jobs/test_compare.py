"""jobs/compare.py on a tiny model: arms and seeds, what is not done again, and the arithmetic of paired differences."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from scipy import stats

from diffdis.config import ObjectiveConfig
from diffdis_platform.commands.compare import parse_arguments as parse
from diffdis_platform.comparison import runs
from diffdis_platform.comparison.plan import plan
from diffdis_platform.comparison.run import compare, table
from diffdis_platform.comparison.summary import claim, interval, paired_differences
from diffdis_platform.config.compare import ARMS, CompareConfig
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import demo_compare
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Stopped
from tests.end_to_end.conftest import write_shards
from tests.support.evaluation_sets import picture, write_wds

COLOURS = ("red", "blue", "gold")
BROKEN = {"broken": {"objective.freeze": ["nothing.*"]}}  # a run finds out only when it builds the model
NUM_STEPS, BATCH_SIZE = 3, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A zero-shot set, a retrieval set and prompts, and shards to train on."""
    root = tmp_path_factory.mktemp("data")
    write_shards(root / "train", num_shards=2)
    labels = [i % 3 for i in range(24)]
    write_wds(root, "mine", [picture(i) for i in range(24)], labels=labels, classes=COLOURS, templates=["{c}"])
    write_wds(root, "pairs", [picture(100 + i) for i in range(20)], captions=[[f"picture {i}"] for i in range(20)])
    (root / "suite.yaml").write_text("sets: [mine, pairs]\n")
    return root


@pytest.fixture(scope="module")
def config_of(tiny_model, root):
    """config_of(output_dir, **fields) -> a CompareConfig of short runs of one worker."""

    def make(output_dir, **fields):
        sources = (str(root / "train"),)
        train = TrainConfig(
            num_steps=NUM_STEPS, micro_batch_size=BATCH_SIZE, log_every=1, preview_every=0, cpus_per_worker=0.5, max_failures=0,
            heldout_sources=sources, heldout_samples=8, heldout_every=2,
        )  # fmt: skip
        pretrain = PretrainConfig(
            model=tiny_model,
            objective=ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, num_draws=2),
            data=DataConfig(sources=sources, image_size=tiny_model.image_size),
            train=train,
        )
        evaluation = EvalConfig(
            suite=str(root / "suite.yaml"),
            data_roots=(str(root),),
            scoring=ScoringConfig(num_steps=2),
            quality=QualityConfig(
                prompts=str(root / "wds_pairs"), reference=str(root / "wds_pairs"), guidance_scales=(1.0,), num_steps=2
            ),
            num_workers=1,
            cpus_per_worker=0.5,
        )
        fields = {"arms": ("joint", "generation"), "seeds": (0,)} | fields
        config = CompareConfig(output_dir=str(output_dir), pretrain=pretrain, evaluation=evaluation, **fields)
        config.check()
        return config

    return make


def run(config):
    return compare(config, plan(config), "tiny", "python jobs/compare.py")


class Cut(BaseException):
    """As a signal would: nothing catches it."""


@pytest.fixture(scope="module")
def whole(ray_cluster, config_of, tmp_path_factory):
    """(config, summary) of a comparison with an arm that fails, which was cut off in the evaluation of its second run."""
    config = config_of(tmp_path_factory.mktemp("comparison"), arms=("joint", "generation", "broken"), own_arms=BROKEN)
    evaluated = []

    def cut_off(*arguments):
        evaluated.append(arguments)
        if len(evaluated) == 2:
            raise Cut
        return evaluate(*arguments)

    evaluate = runs.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "evaluate", cut_off)
        with pytest.raises(Cut):
            run(config)
    made = plan(config)
    assert made.left == [("generation", 0), ("broken", 0)], "the first run is done"
    return config, run(config)


def read(config, *parts):
    return json.loads(Path(config.output_dir, *parts).read_text())


def test_every_arm_and_seed_has_its_figures_and_costs(whole):
    config, summary = whole
    joint, generation = (summary["arms"][arm]["seeds"] for arm in ("joint", "generation"))
    assert list(joint) == list(generation) == ["0"]
    assert {"accuracy", "accuracy_mine", "retrieval_recall_at_1", "image_retrieval_recall_at_1", "fd", "kid"} <= set(joint["0"])
    assert "fd" in generation["0"]
    assert not [name for name in generation["0"] if "accuracy" in name or "recall" in name], "absent, not zero"
    for figures in (*joint.values(), *generation.values()):
        assert figures["samples"] == NUM_STEPS * BATCH_SIZE
        assert figures["seconds"] > 0
        assert figures["flops"] == pytest.approx(figures["flops_a_sample"] * figures["samples"], rel=1e-6)
    assert joint["0"]["flops_a_sample"] > generation["0"]["flops_a_sample"]
    assert joint["0"]["parameters"] > generation["0"]["parameters"]
    assert summary["arms"]["joint"]["mean"]["fd"] == joint["0"]["fd"]
    assert summary["arms"]["joint"]["std"]["fd"] is None, "one seed has no spread"
    assert summary["paired"]["fd_joint_minus_generation"]["mean"] == joint["0"]["fd"] - generation["0"]["fd"]
    assert summary["paired"]["fd_joint_minus_generation"]["low"] is None
    assert not summary["claim"]["holds"]
    assert "not measured: accuracy_joint_minus_alignment" in summary["claim"]["why"]
    assert summary == read(config, "summary.json")
    assert "4 CPUs" in summary["environment"]


def test_a_result_says_how_it_came_about(whole):
    config, summary = whole
    result = read(config, "runs", "joint_seed0", "result.json")
    assert result["figures"] == summary["arms"]["joint"]["seeds"]["0"]
    assert result["metrics"]["eval/mine/acc1"] == result["figures"]["accuracy_mine"]
    assert {"arms": summary["config"]["arms"], **result["config"]} == summary["config"]
    assert "step_00000003" in result["checkpoint"]
    assert [point["samples"] for point in result["curve"]] == [2 * BATCH_SIZE, 3 * BATCH_SIZE]
    assert "heldout/acc1" in result["curve"][0]["metrics"]


def test_an_arm_that_fails_is_a_line_and_ends_nothing(whole):
    _, summary = whole
    assert len(summary["failures"]) == 1
    assert summary["failures"][0].startswith("broken, seed 0: objective.freeze: no parameter is called nothing.*")
    assert summary["arms"]["broken"]["seeds"] == {}


def test_a_run_that_was_cut_off_behind_its_training_is_not_trained_again(whole):
    config, _ = whole
    launches = list(Path(config.output_dir, "runs", "generation_seed0", "checkpoints").iterdir())
    assert len(launches) == 1


def test_what_is_done_is_not_done_again(whole, monkeypatch):
    config, summary = whole
    monkeypatch.setattr("diffdis_platform.comparison.run.measure", None)
    again = run(dataclasses.replace(config, arms=("joint", "generation")))
    assert again["arms"]["joint"] == summary["arms"]["joint"]
    assert again["failures"] == []


def test_an_earlier_summary_counts_as_done(whole, config_of, tmp_path):
    config, summary = whole
    shutil.copy(f"{config.output_dir}/summary.json", tmp_path / "summary.json")
    made = plan(config_of(tmp_path, arms=("joint", "joint_mask"), seeds=(0, 1)))
    assert made.left == [("joint_mask", 0), ("joint", 1), ("joint_mask", 1)]
    assert made.results["generation"][0] == summary["arms"]["generation"]["seeds"]["0"], "arms of before are kept"


def test_sigterm_ends_the_comparison_and_not_only_the_run(ray_cluster, config_of, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("stopped by SIGTERM; saved at step 2")

    monkeypatch.setattr("diffdis_platform.comparison.run.measure", stopped)
    with pytest.raises(Stopped):
        run(config_of(tmp_path))
    assert read(config_of(tmp_path), "summary.json")["failures"] == []


def test_a_field_that_came_later_does_not_make_another_comparison(whole, config_of, tmp_path):
    earlier = json.loads(json.dumps(whole[1]))
    del earlier["config"]["pretrain"]["train"]["ema_decay"]  # 0 by default, as here
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    assert plan(config_of(tmp_path)).left == []
    del earlier["config"]["pretrain"]["train"]["max_failures"]  # 0 here
    (tmp_path / "summary.json").write_text(json.dumps(earlier))
    assert "pretrain.train.max_failures: 3 there, 0 here" in refusal(plan, config_of(tmp_path))


@pytest.mark.slow
def test_an_earlier_summary_is_extended_by_a_seed(whole, config_of, tmp_path):
    config, summary = whole
    shutil.copy(f"{config.output_dir}/summary.json", tmp_path / "summary.json")
    extended = run(config_of(tmp_path, seeds=(0, 1)))
    joint, generation = (extended["arms"][arm]["seeds"] for arm in ("joint", "generation"))
    assert list(joint) == list(generation) == ["0", "1"]
    assert joint["0"] == summary["arms"]["joint"]["seeds"]["0"]
    assert joint["0"]["fd"] != joint["1"]["fd"]
    assert extended["arms"]["joint"]["std"]["fd"] == pytest.approx(np.std([run["fd"] for run in joint.values()], ddof=1))
    test = stats.ttest_rel(*([run["fd"] for run in arm.values()] for arm in (joint, generation))).confidence_interval(0.95)
    paired = extended["paired"]["fd_joint_minus_generation"]
    assert (paired["low"], paired["high"], paired["n"]) == (pytest.approx(test.low), pytest.approx(test.high), 2)


def test_another_comparison_in_the_folder_is_refused(whole, config_of):
    config, _ = whole
    train = dataclasses.replace(config.pretrain.train, num_steps=4)
    other = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, train=train))
    assert "holds another comparison (pretrain.train.num_steps: 3 there, 4 here)" in refusal(plan, other)
    renamed = dataclasses.replace(config, own_arms={"broken": {"objective.lambda_alignment": 2.0}})
    assert "own_arms.broken" in refusal(plan, renamed)


def test_the_page_and_the_samples_are_there(whole):
    config, summary = whole
    page = Path(config.output_dir, "report.html").read_text()
    assert "picture 3" in page
    assert "objective.freeze" in page
    assert "generation" in table(summary)
    for arm in ("joint", "generation"):
        assert Path(config.output_dir, "samples", f"{arm}_seed0.png").read_bytes().startswith(b"\x89PNG")


def test_mlflow_shows_the_runs_below_the_comparison(whole):
    config, summary = whole
    tracked = read(config, "mlflow.json")
    client = MlflowClient(tracked["tracking_uri"])
    parent = client.get_run(tracked["run_id"])
    assert parent.data.metrics["paired/fd_joint_minus_generation/mean"] == summary["paired"]["fd_joint_minus_generation"]["mean"]
    artifacts = {file.path for file in client.list_artifacts(tracked["run_id"])}
    assert {"summary.json", "report.html", "samples", "config.yaml"} <= artifacts
    found = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{tracked['run_id']}'")
    names = {run.info.run_name for run in found}
    assert {"joint seed 0", "generation seed 0", "broken seed 0"} <= names
    measured = next(run for run in found if run.info.run_name == "joint seed 0")
    assert measured.data.metrics["eval/mine/acc1"] == summary["arms"]["joint"]["seeds"]["0"]["accuracy_mine"]


def test_intervals_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    mine, theirs = rng.normal(0.1, 0.02, 5), rng.normal(0.05, 0.02, 5)
    test = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    found = interval(list(mine - theirs))
    assert (found["low"], found["high"]) == pytest.approx((test.low, test.high))
    assert (found["mean"], found["n"]) == (pytest.approx((mine - theirs).mean()), 5)
    assert interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}


def test_differences_are_of_what_both_arms_have_over_the_seeds_that_both_have():
    results = {
        "joint": {seed: {"accuracy": 0.3 + seed / 10, "fd": 50.0, "seconds": 9.0} for seed in (0, 1, 2)},
        "alignment": {seed: {"accuracy": 0.2, "seconds": 4.0} for seed in (1, 2, 3)},
        "joint_mask": {0: {"accuracy": 0.5, "fd": 3.0}},
        "one_way_mask": {0: {"accuracy": 0.25, "fd": 1.0}},
        "generation": {},
    }
    found = paired_differences(results)
    assert set(found) == {
        "accuracy_joint_minus_alignment",
        "accuracy_joint_mask_minus_one_way_mask",
        "fd_joint_mask_minus_one_way_mask",
    }
    assert found["accuracy_joint_minus_alignment"]["mean"] == pytest.approx(0.25)
    assert found["accuracy_joint_minus_alignment"]["n"] == 2


@pytest.mark.parametrize(
    ("accuracy", "fd", "holds", "why"),
    [
        ((0.01, 0.03), (-5, -1), True, "over 3 seeds"),
        ((-0.01, 0.03), (-5, -1), False, "which holds zero"),
        ((0.01, 0.03), (1, 5), False, "of the opposite sign"),
        ((None, None), (-5, -1), False, "no interval"),
    ],
)
def test_the_claim_holds_where_both_intervals_exclude_zero_on_the_papers_side(accuracy, fd, holds, why):
    paired = {
        name: {"mean": 0.0, "low": low, "high": high, "n": 3}
        for name, (low, high) in (("accuracy_joint_minus_alignment", accuracy), ("fd_joint_minus_generation", fd))
    }
    found = claim(paired)
    assert found["holds"] is holds
    assert why in found["why"]


def refusal(call, *arguments):
    with pytest.raises((ConfigError, DataError)) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "demo"], "--recipe demo: no such recipe; choose one of demo_compare"),
        (["--output_dir", "x"], "output_dir: x; give an absolute folder"),
        (["--arms", "jont"], "arms: there is no jont; there are joint, generation, alignment, clip, joint_mask, one_way_mask"),
        (["--seeds", "[1, 1]"], "seeds: [1, 1]; give at least one, and none twice"),
        (["--seeds", "[-1]"], "seeds: -1 is below 0"),
        (["--own_arms", '{"clip": {}}'], "own_arms: there is an arm clip already"),
        (["--own_arms", '{"a b": {}}'], "own_arms: 'a b'; a name has up to 64 letters"),
        (
            ["--arms", "a", "--own_arms", '{"a": {"train.num_steps": 9}}'],
            "own_arms.a: train.num_steps; an arm has fields of model",
        ),
        (["--arms", "a", "--own_arms", '{"a": {"objective.lamda": 9}}'], "own_arms.a: --objective.lamda: no such field; did you"),
        (["--arms", "a", "--own_arms", '{"a": {"model.schedule.gamma": 9}}'], "own_arms.a: model.schedule.gamma: 9.0 is not in"),
        (["--pretrain.train.seed", "3"], "pretrain.train.seed: is set by the comparison; give seeds"),
        (["--pretrain.output_dir", "/x"], "pretrain.output_dir: is set by the comparison; give output_dir"),
    ],
)
def test_bad_fields_are_one_line(arguments, message):
    assert message in refusal(parse, ["--output_dir", "/x", *arguments])


def test_missing_data_are_one_line(config_of, tmp_path, root):
    config = parse(["--output_dir", str(tmp_path), "--demo_data", "/none"]).config
    assert "/none" in refusal(plan, config)
    config = config_of(tmp_path)
    config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, suite="demo"))
    assert "heldout_style: not found below" in refusal(plan, config)
    (tmp_path / "summary.json").write_text("{}")
    assert "is no summary of a comparison" in refusal(plan, config_of(tmp_path))


def test_the_recipe_parses_to_itself_and_arms_differ_in_their_fields_alone(tmp_path):
    config = parse(["--demo_data", "/data/demo", "--output_dir", "/x"]).config
    assert config == dataclasses.replace(demo_compare("/data/demo"), output_dir="/x")
    joint = config.pretrain_of("joint", 3)
    assert (joint.train.seed, joint.train.resume, joint.output_dir) == (3, "auto", "/x/runs/joint_seed3")
    for arm in ARMS:
        other = config.pretrain_of(arm, 3)
        assert dataclasses.replace(other, model=joint.model, objective=joint.objective, output_dir=joint.output_dir) == joint
    assert config.evaluation_of("clip", 0).quality.prompts == ""
    assert config.evaluation_of("generation", 0).quality.prompts
