"""The precompute job: its files, output, resume and exit status."""

import json
from pathlib import Path

import pytest

from diffdis_platform.commands.precompute import parse_arguments as parse
from ray_platform.contracts import ConfigError
from ray_platform.data import precomputed
from ray_platform.data.precompute import PrecomputeProgress
from tests.ray_platform.conftest import samples_of, tar_of
from tests.support.commands import error_of


@pytest.fixture
def shards(tmp_path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(tar_of(samples_of(10 * number, 5)))
    return tmp_path


def run_script(monkeypatch, *arguments: str) -> str | None:
    """Return the error that the command reports; None if it succeeds."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # not used: this process is attached to a cluster
    return error_of("precompute", *arguments)


@pytest.mark.slow
def test_the_demos_encoders(ray_cluster, shards, monkeypatch, capfd):
    out = shards / "out"
    command = ("--data.sources", str(shards), "--output_dir", str(out), "--cpus_per_encoder", "0.5")
    assert run_script(monkeypatch, *command) is None
    printed = capfd.readouterr().out
    assert "3 of 3 shards, 15 samples" in printed
    assert f"done: precomputed shards are in {out}" in printed
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 15
    assert manifest["encoders"].keys() == {"image_size", "autoencoder", "text_encoder"}
    keys, captions, tensors = precomputed.from_arrow(next(out.glob("*.arrow")).read_bytes())
    assert len(keys) == len(captions) == 5
    assert {name: array.shape[1:] for name, array in tensors.items()} == {
        "latent": (12, 16, 16),
        "token_states": (tensors["token_states"].shape[1], 384),
        "query": (384,),
    }
    assert run_script(monkeypatch, *command) is None
    assert "all shards were precomputed already" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output_dir", "made"), "output_dir: made; give an absolute folder or an s3:// URL"),
        (("--output_dir", "/x", "--batch_size", "0"), "num_encoders and batch_size: must be at least 1"),
        (("--output_dir", "/x", "--cpus_per_encoder", "0"), "cpus_per_encoder must be above 0"),
        (
            ("--output_dir", "/x", "--recipe", "none"),
            "--recipe none: no such recipe; choose one of demo, sd_v1_laion, sd_v1_laion_joint_mask",
        ),
        (("--output_dir", "/x", "--num_encoder", "2"), "--num_encoder: no such field; did you mean --num_encoders"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as raised:
        parse(arguments)
    assert message in str(raised.value)
    assert "one_way" not in str(raised.value), "a deprecated recipe"
    assert "\n" not in str(raised.value)


def test_shards_that_storage_did_not_return_are_reported_at_the_end(monkeypatch, shards, capsys):
    progress = PrecomputeProgress(shards_done=3, shards=3, shards_lost=1, samples=10, samples_per_second=5.0, seconds_left=0.0)
    monkeypatch.setattr("ray_platform.data.precompute.precompute", lambda *_: iter([progress]))
    monkeypatch.setattr("diffdis_platform.commands.precompute.connect_cluster", lambda _: None)
    assert run_script(monkeypatch, "--data.sources", str(shards), "--output_dir", str(shards / "out")) is None
    assert "1 of 3 shards are left out" in capsys.readouterr().out


def test_data_that_does_not_fit(monkeypatch, shards):
    assert str(run_script(monkeypatch, "--output_dir", "/x")).startswith("error: data.sources: empty")
    ended = run_script(monkeypatch, "--data.sources", str(shards), "--output_dir", "/x", "--data.image_size", "64")
    assert ended == "error: data.image_size: 64, but model.image_size is 32; make them equal"
