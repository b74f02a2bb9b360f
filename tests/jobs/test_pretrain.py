"""The command line of pretraining: overrides, saved configurations, and one-line errors for invalid input."""

import dataclasses
import json
import os

import pytest
import torch

from diffdis_platform.cli import main
from diffdis_platform.commands.pretrain import parse_arguments as parse
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes import recipes_of, sd_v1_laion
from ray_platform.contracts import ConfigError, DataError
from tests.support.messages import check_message
from tests.support.training import write_shards


@pytest.mark.parametrize("recipe", recipes_of(PretrainConfig))
def test_every_recipe_parses_to_itself_and_has_values_of_the_right_types(recipe, tmp_path):
    command = parse(["--recipe", recipe])
    assert command.config == recipes_of(PretrainConfig)[recipe]()
    (tmp_path / "saved.yaml").write_text(command.yaml)
    assert parse(["--config", str(tmp_path / "saved.yaml")]).config == command.config  # which checks all types


def test_texts_that_look_like_other_values_survive_in_a_saved_file(tmp_path):
    texts = [
        "null",
        "true",
        "1e3",
        "5e5",
        "-1e-5",
        "._",
        "12",
        "2020-01-01",
        "a: b",
        "#c",
        "'q'",
        " x ",
        "é\n",
        "~",
        "-",
        "[a]",
        "=",
    ]
    arguments = [
        "--preview_captions",
        json.dumps(texts),
        "--tracking.tags",
        '{"z": "1e3", "a": "no"}',
        "--objective.lr_unet",
        "1e-5",
    ]
    command = parse(arguments)
    assert command.config.preview_captions == tuple(texts)
    (tmp_path / "saved.yaml").write_text(command.yaml)
    config = parse(["--config", str(tmp_path / "saved.yaml")]).config
    assert config == command.config
    assert list(config.tracking.tags) == ["z", "a"]  # in a sweep, the first objective decides


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('{"num_step": 3}', "--train.num_step: no such field; did you mean --train.num_steps?"),
        ('{"num_steps": "x"}', "train.num_steps: x is not of type int"),
        ('{"resume": 5}', "train.resume: 5 is not of type str"),
        ('{"resume": null}', "train.resume: null is not"),
        ('{"zero_stage": true}', "train.zero_stage: true is not"),
        ('{"heldout_sources": 5}', "train.heldout_sources: 5 is not"),
        ("5", "--train: this is a section"),
        ('{"num_steps"', "--train: this is a section"),
        ("{token: secret}", "--train.token: no such field"),
        ("[" * 5000, "--train: this is a section"),
        ("", "--train: this is a section"),
    ],
)
def test_a_section_is_an_object(argument, message):
    for text in ('{"num_steps": 3, "betas": [0.5, 0.9]}', "{num_steps: 3, betas: [0.5, 0.9]}"):
        train = parse(["--train", text, "--train.seed", "7"]).config.train
        assert (train.num_steps, train.betas, train.seed) == (3, (0.5, 0.9), 7)
    with pytest.raises(ConfigError, match=message) as raised:
        parse(["--train", *argument.splitlines()])
    assert "secret" not in str(raised.value)


def test_any_field_can_be_overridden():
    config = parse(["--train.zero_stage", "3", "--model.schedule.query_snr=0.5", "--data.sources", "s3://b/x"]).config
    assert (config.train.zero_stage, config.model.schedule.query_snr, config.data.sources) == (3, 0.5, ("s3://b/x",))
    ranges = parse(["--data.filters.ranges", "{num_faces: [0, 2], words: [5, null]}"]).config.data.filters.ranges
    assert ranges == {"num_faces": (0, 2), "words": (5, None)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.sources", "a b", "[c]", "--data.weights", "1", "2"],
        ["--data.sources", '["a b", "[c]"]', "--data.weights", "[1, 2]"],
        ['--data.sources=["a b", "[c]"]', "--data.weights=[1,2]"],
    ],
)
def test_lists_are_several_values_or_json(arguments):
    data = parse(arguments).config.data
    assert (data.sources, data.weights) == (("a b", "[c]"), (1.0, 2.0))


def test_a_boolean_field_without_a_value_is_true():
    train = parse(["--train.compile", "--train.profile", "false", "--train.channels_last=true"]).config.train
    assert (train.compile, train.profile, train.channels_last) == (True, False, True)


def test_resume_and_profile_have_short_names():
    for arguments in (["--resume", "auto", "--profile"], ["--resume=auto", "--profile"]):
        train = parse(arguments).config.train
        assert (train.resume, train.profile) == ("auto", True)


def test_the_number_of_workers_may_be_a_range():
    for values in (["2", "8"], ["[2, 8]"]):
        train = parse(["--train.num_workers", *values]).config.train
        assert (train.min_workers, train.max_workers, train.elastic) == (2, 8, True)
    assert parse(["--train.num_workers", "3"]).config.train.max_workers == 3


def test_a_saved_configuration_can_be_started_from_again(tmp_path):
    first = parse(["--recipe", "demo", "--train.seed", "7", "--output_dir", "/x"])
    (tmp_path / "config.yaml").write_text(first.yaml)
    assert parse(["--config", str(tmp_path / "config.yaml")]).config == first.config
    (tmp_path / "config.yaml").write_text(first.yaml.replace("recipe: demo", "recipe: removed"))
    assert parse(["--config", f"file://{tmp_path}/config.yaml"]).config == first.config


def test_a_configuration_file_starts_from_the_recipe_that_it_names(tmp_path):
    (tmp_path / "part.yaml").write_text("recipe: sd_v1_laion\ntrain: {num_steps: 5000}")
    command, base = parse(["--config", str(tmp_path / "part.yaml")]), sd_v1_laion()
    assert command.recipe == "sd_v1_laion"
    assert command.config == dataclasses.replace(base, train=dataclasses.replace(base.train, num_steps=5000))
    (tmp_path / "saved.yaml").write_text(command.yaml)
    for name in ("part.yaml", "saved.yaml"):
        assert parse(["--config", str(tmp_path / name), "--recipe", "sd_v1_laion"]).config == command.config
        with pytest.raises(ConfigError, match=r"^--recipe: demo, but --config has sd_v1_laion"):
            parse(["--recipe", "demo", f"--config={tmp_path / name}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: sd_v2_laion", "--recipe sd_v2_laion: no such recipe"),
        ("recipe: demo\ntrian: {num_steps: 5}", "trian"),
        ("- recipe: demo", "--config: .*part.yaml has no fields"),
    ],
)
def test_faults_in_a_configuration_file_are_one_line(tmp_path, text, message):
    (tmp_path / "part.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        parse(["--config", str(tmp_path / "part.yaml")])
    assert "\n" not in str(raised.value)


BAD_FIELDS = {  # in docs/operations.md
    "--train.zero_stge": "a field is misspelled",
    "--objective.lambda_alignment": "a value is out of range",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "dmo"], "--recipe dmo: no such recipe; choose one of demo, sd_v1_laion, sd_v1_laion_joint_mask$"),
        (["--train.zero_stge", "1"], r"--train.zero_stge: no such field; did you mean --train.zero_stage\?"),
        (["--train.num_steps", "many"], r"train\.num_steps: .*many"),
        (["--train.num_steps", "0"], r"train\.num_steps: 0 is below 1"),
        (["--model.schedule.gamma", "3"], r"model\.schedule\.gamma: 3.0 is not in \(0, 1\]"),
        (["--train.zero_stage", "7"], "train.zero_stage"),
        (["--train.warmup_steps", "-1"], r"train\.warmup_steps: -1"),
        (["--objective.caption_dropout", "1.5"], r"objective\.caption_dropout: 1\.5"),
        (["--objective.lambda_alignment", "-1"], r"objective\.lambda_alignment: -1"),
        (["--objective.lr_unet", "-1"], r"objective\.lr_unet: -1"),
        (["--objective.num_draws", "0"], r"objective\.num_draws: 0"),
        (["--objective.temperature", "0"], r"objective\.temperature: 0"),
        (["--model.image_dropout", "1"], r"model\.image_dropout: 1"),
        (["--train.compile", "perhaps"], "train.compile"),
        (["--data.weights", "1", "many"], "data.weights"),
        (["--data.sources"], "data.sources"),
        (["demo"], "demo"),
    ],
)
def test_bad_fields_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse(arguments)
    assert "\n" not in str(raised.value)
    if fault := BAD_FIELDS.get(arguments[0]):
        check_message(fault, raised.value)


def run_of(tmp_path, *arguments):
    command = parse(["--output_dir", str(tmp_path / "out"), *arguments])
    return command.config.plan(command.recipe)


def test_dry_run_says_what_would_run(tmp_path):
    folder = write_shards(tmp_path / "data")
    plan = run_of(tmp_path, "--data.sources", str(folder)).dry_run()
    assert (plan["shards"], plan["workers"], plan["starts_from"]) == (4, 2, "the beginning")
    assert plan["weights"]["model.text_encoder.path"]["dtypes"] == ["float32"]
    json.dumps(plan)
    assert not (tmp_path / "out").exists()


CANNOT_RUN = {  # by the last two arguments; in docs/operations.md
    "--data.sources /none": "the data does not exist",
    "--train.num_workers 9": "more workers than shards",
    "--output_dir /dev/null/x": "the output folder cannot be written",
    "--train.heldout_sources /none": "the validation data does not exist",
    "--train.gpus_per_worker 1": "more GPUs than there are",
    "--train.cpus_per_worker 1000": "more CPUs than there are",
    "--model.text_encoder.path /none": "an encoder does not exist",
    "--model.warm_start /none": "the weights do not exist",
    "--tracking.uri http://127.0.0.1:9": "a dry run, while MLflow does not answer",
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], DataError, "data.sources"),
        (["--data.sources", "/none"], DataError, "/none: no such file or folder"),
        (["--data.sources", "EMPTY"], DataError, "EMPTY.*tar"),
        (["--data.sources", "DATA", "--train.num_workers", "9"], ConfigError, "9 workers but only 4 shards"),
        (["--data.sources", "DATA", "--output_dir", "outputs/x"], ConfigError, "output_dir: outputs/x is relative"),
        (["--data.sources", "DATA", "--data.image_size", "64"], ConfigError, "data.image_size: 64, but model.image_size is 32"),
        (["--data.sources", "DATA", "--train.resume", "/none"], ConfigError, "/none is not a complete checkpoint"),
        (["--data.sources", "DATA", "--output_dir", "s3://b/x"], ConfigError, "tracking.uri"),
        (["--data.sources", "DATA", "--output_dir", "/proc/x"], ConfigError, "output_dir: /proc/x cannot be written"),
        (["--data.sources", "DATA", "--output_dir", "/dev/null/x"], ConfigError, "output_dir: /dev/null/x cannot be written"),
        (["--data.sources", "DATA", "--train.heldout_sources", "/none"], DataError, "train.heldout_sources: /none: no such"),
        (["--data.sources", "DATA", "--train.gpus_per_worker", "1"], ConfigError, "train.num_workers: .*1 GPUs"),
        (["--data.sources", "DATA", "--train.cpus_per_worker", "1000"], ConfigError, "train.num_workers: .*1000 CPUs"),
        (["--data.sources", "DATA", "--data.cpus_per_read", "1000"], ConfigError, "data.cpus_per_read: .*machine"),
        (["--data.sources", "DATA", "--model.text_encoder.path", "/none"], ConfigError, "model.text_encoder.path: /none"),
        (["--data.sources", "DATA", "--model.text_encoder.path", "EMPTY"], ConfigError, "model.text_encoder.path: .*config.json"),
        (["--data.sources", "DATA", "--model.warm_start", "/none"], ConfigError, "model.warm_start: /none"),
        (["--data.sources", "DATA", "--objective.alignment_loss", "infonse"], ConfigError, "objective.alignment_loss: .*infonce"),
        (["--data.sources", "DATA", "--objective.freeze", "unett.*"], ConfigError, "objective.freeze: .*unett"),
        (
            ["--data.sources", "DATA", "--objective.lr_overrides", '{"unett.*": 1e-5}'],
            ConfigError,
            "objective.lr_overrides: .*unett",
        ),
        (["--data.sources", "DATA", "--objective.query_timestep_min", "1000"], ConfigError, "objective.query_timestep_min"),
        (
            ["--data.sources", "DATA", "--train.compile", "true", "--objective.noised_alignment_weight", "1"],
            ConfigError,
            "objective.noised_alignment_weight: .*train.compile",
        ),
        (["--data.sources", "DATA", "--tracking.uri", "http://127.0.0.1:9"], ConfigError, "tracking.uri: http://127.0.0.1:9 "),
    ],
)
def test_what_cannot_run_is_one_line(tmp_path, monkeypatch, arguments, error, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    write_shards(tmp_path / "DATA")
    (tmp_path / "EMPTY").mkdir()
    arguments = [str(tmp_path / a) if a in ("DATA", "EMPTY") else a for a in arguments]
    with pytest.raises(error, match=message) as raised:
        run_of(tmp_path, *arguments).dry_run()
    assert "\n" not in str(raised.value)
    if fault := CANNOT_RUN.get(" ".join(arguments[-2:])):
        check_message(fault, raised.value, RESOURCES=f"{os.cpu_count()} CPUs, 0 GPUs")


def test_a_run_that_cannot_start_ends_with_the_line_and_a_status(capsys):
    assert main(["pretrain", "--recipe", "demo", "--data.sources", "/none", "--output_dir", "/tmp/none"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: data.sources: /none: no such file or folder")
