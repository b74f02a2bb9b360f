"""Output, logs, saved files and MLflow data contain no secrets, and a saved configuration can still be run."""

import json
import logging

import pytest
import yaml
from mlflow import MlflowClient

from diffdis_platform.cli import run_command
from diffdis_platform.commands.pretrain import parse_arguments as parse
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.redaction import is_redacted, redacted, redacted_traceback, redacted_values, restored
from ray_platform.tracking import TrackingConfig, delivery, start_run
from ray_platform.train.failures import Interrupted
from ray_platform.train.fault_tolerance import RestartPolicy

PASSWORD = "hunter2-and-more"
URI = f"postgresql://mlflow:{PASSWORD}@db:5432/mlflow"
SIGNED = "https://b.s3.amazonaws.com/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F1&X-Amz-Signature=0badc0de&x=1"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URI, "postgresql://***@db:5432/mlflow"),
        ("see https://user:p@ss/w@host/x.", "see https://***@host/x."),
        ("git clone https://ghp_token@github.com/x", "git clone https://***@github.com/x"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtnFEMI@bucket/x", "s3://***@bucket/x"),
        (SIGNED, "https://b.s3.amazonaws.com/k?X-Amz-Credential=***&X-Amz-Signature=***&x=1"),
        ("AWS_SECRET_ACCESS_KEY=abc python x.py", "AWS_SECRET_ACCESS_KEY=*** python x.py"),
        ('AWS_SECRET_ACCESS_KEY="a b" python x.py', "AWS_SECRET_ACCESS_KEY=*** python x.py"),
        ("python x.py --tracker.api_key 'abc def' --y", "python x.py --tracker.api_key *** --y"),
        ('{"wandb": {"api_key": "abc"}}', '{"wandb": {"api_key": "***"}}'),
        ("Authorization: Bearer abcdefgh.ijk", "Authorization: Bearer ***"),
        (f"hf_{'a' * 34}", "***"),
        # Values that only look like secrets.
        ("http://mlflow:5000/#/runs", "http://mlflow:5000/#/runs"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("a photo of me@home, model.text_encoder.token_dim 384", "a photo of me@home, model.text_encoder.token_dim 384"),
        ("--model.text_encoder.token_dim=384", "--model.text_encoder.token_dim=384"),
        ("s3://bucket/part-*/{00000..00009}.tar", "s3://bucket/part-*/{00000..00009}.tar"),
    ],
)
def test_what_is_hidden_and_what_is_not(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_the_environments_own_secrets_go_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "a/long+secret")
    monkeypatch.setenv("MY_SHORT_TOKEN", "x")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    assert redacted("it said a/long+secret, a%2Flong%2Bsecret, x and 0123456789abcdef") == "it said ***, ***, x and ***"


def test_values_are_hidden_by_their_names():
    config = {"token_dim": 384, "token": "abc", "inner": [{"aws_secret_access_key": "abc"}], "uri": URI, "none": None}
    shown = {"token_dim": 384, "token": "***", "inner": [{"aws_secret_access_key": "***"}], "uri": redacted(URI), "none": None}
    assert redacted_values(config) == shown
    assert redacted_values({"password": [{"a": "abc"}], "x": {URI: 1, 5: "y"}}) == {
        "password": [{"a": "***"}],
        "x": {redacted(URI): 1, 5: "y"},
    }


def test_what_was_hidden_is_found_again_in_what_is_given():
    assert restored(redacted(URI), URI) == URI
    assert restored(redacted(URI), "postgresql://mlflow:x@other/db") == redacted(URI)
    assert restored("sqlite:////x.db", URI) == "sqlite:////x.db"
    assert [is_redacted(text) for text in (redacted(URI), "***", redacted(SIGNED), URI, "a *** b")] == [True] * 3 + [False] * 2


def test_errors_hide_what_they_quote():
    assert str(DataError(f"cannot reach {URI}")) == str(ConfigError(f"cannot reach {URI}")) == f"cannot reach {redacted(URI)}"
    assert PASSWORD not in str(storage.StorageError(f"{URI}: gone", "missing"))
    foreign = RuntimeError(f"cannot\nreach {URI}")
    assert one_line(foreign) == f"cannot reach {redacted(URI)}"
    assert PASSWORD[:4] not in one_line(foreign, max_length=45)
    assert redacted(URI) in redacted_traceback(foreign)
    assert PASSWORD not in redacted_traceback(foreign)


def test_the_failure_of_a_worker_hides_what_it_quotes(tmp_path):
    policy = RestartPolicy(1, lambda: "", str(tmp_path))
    for error in (RuntimeError(f"cannot reach {URI}"), Interrupted(f"node drained; no checkpoint ({URI}: gone)")):
        line = policy.record_failure(error, "", "")
        assert redacted(URI) in line
        assert PASSWORD not in line
    assert redacted(URI) in (tmp_path / "failures.log").read_text()
    assert PASSWORD not in (tmp_path / "failures.log").read_text()


def test_a_saved_configuration_has_no_secret_and_names_the_field_to_give_again(tmp_path):
    deepspeed = json.dumps({"wandb": {"api_key": "abc", "team": "x"}})
    command = parse(["--tracking.uri", URI, "--train.zero_stage", "1", "--train.deepspeed", deepspeed, "--output_dir", "/x"])
    saved = yaml.safe_load(command.yaml)
    assert (saved["tracking"]["uri"], saved["train"]["deepspeed"]) == (redacted(URI), {"wandb": {"api_key": "***", "team": "x"}})
    (tmp_path / "config.yaml").write_text(command.yaml)
    start = ["--config", str(tmp_path / "config.yaml")]
    with pytest.raises(ConfigError, match=r"^--train.deepspeed.wandb.api_key: a secret in it was not saved"):
        parse(start)
    with pytest.raises(ConfigError, match=r"^--tracking.uri: a secret in it was not saved"):
        parse([*start, "--train.zero_stage", "1", "--train.deepspeed", deepspeed])
    again = parse([*start, "--tracking.uri", URI, "--train.zero_stage", "1", "--train.deepspeed", deepspeed])
    assert (again.config, again.yaml) == (command.config, command.yaml)


def test_s3_credentials_are_rejected_in_any_field():
    with pytest.raises(ConfigError, match=r"^model.warm_start: .*credentials"):
        parse(["--model.warm_start", "s3://key:secret@bucket/x"])


def test_a_run_connects_with_the_password_and_describes_itself_without():
    run = parse(["--tracking.uri", URI, "--output_dir", "s3://bucket/x"]).config.run("demo")
    assert (run.tracking.uri, run.params["tracking"]["uri"]) == (URI, redacted(URI))
    assert PASSWORD not in json.dumps(run.params)


def test_mlflow_shows_stars(tmp_path):
    with start_run(TrackingConfig(), str(tmp_path)) as tracker:
        tracker.log_params({"tracking": {"uri": URI}, "api_key": "abc", "signed": SIGNED})
    params = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(tracker.run_id()).data.params
    assert params == {"tracking.uri": redacted(URI), "api_key": "***", "signed": redacted(SIGNED)}
    artifact = next(tmp_path.rglob("config.yaml")).read_text()
    assert PASSWORD not in artifact
    assert "***" in artifact


def test_a_tracker_that_fails_does_not_print_or_store_the_password(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(delivery, "_END_SECONDS", 0.0)
    config = TrackingConfig(uri=f"nosuch://mlflow:{PASSWORD}@db/mlflow")
    with caplog.at_level(logging.WARNING), start_run(config, str(tmp_path), record=True) as tracker:
        tracker.run_id()
    assert "tracking: mlflow does not answer" in caplog.text
    assert PASSWORD not in caplog.text
    assert not [file for file in tmp_path.rglob("*.json*") if PASSWORD in file.read_text()]


def test_the_command_prints_none(tmp_path, capsys):
    """Covers the configuration that `--dry-run` prints and the error line."""
    arguments = ["--tracking.uri", URI, "--output_dir", str(tmp_path), "--data.sources", f"https://user:{PASSWORD}@host/x"]
    assert run_command("pretrain", [*arguments, "--dry-run"]) == 1
    printed = capsys.readouterr()
    assert PASSWORD not in printed.out + printed.err
    assert printed.err.strip().splitlines()[-1].startswith("error: ")
