"""Name, tags, description and datasets of a run in the tracker."""

import re
import shutil
import subprocess

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.tracking import run_metadata
from ray_platform.tracking.run_metadata import dated_name, run_tags
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import describe_run, tracked_data


def datasets(sources, weights=(), max_read_mb=256):
    config = DataConfig(sources=tuple(map(str, sources)), weights=weights, max_read_mb=max_read_mb)
    return tracked_data(build_catalog(config), config.sources, "training")


def test_the_digest_of_a_source_depends_on_its_shards_only(shard_folder, tmp_path):
    [alone] = datasets([shard_folder])
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(shard_folder, moved)
    shutil.copytree(shard_folder, other)
    (other / "00003.tar").unlink()
    mixed = datasets([moved, other], weights=(0.75, 0.25), max_read_mb=1)
    assert [(data.name, data.context) for data in mixed] == [("moved", "training"), ("other", "training")]
    assert mixed[0].digest == alone.digest != mixed[1].digest
    assert alone.counts == {"num_shards": 5, "num_bytes": sum(tar.stat().st_size for tar in shard_folder.glob("*.tar"))}
    assert mixed[1].counts["num_shards"] == 4


def test_samples_are_counted_if_every_shard_has_a_count(shard_folder, tmp_path):
    folder = tmp_path / "train"
    shutil.copytree(shard_folder, folder)
    for tar in folder.glob("*.tar"):
        tar.with_name(f"{tar.stem}_stats.json").write_text('{"successes": 2}')
    [counted], [matched] = datasets([folder]), datasets([folder / "0000[0-9].tar"])
    assert (counted.name, counted.counts["num_samples"], counted.url) == ("train", 10, str(folder))
    assert (matched.name, matched.digest, matched.counts) == ("train", counted.digest, counted.counts)
    text = describe_run("demo", "", TrainConfig(num_steps=1000), [counted], "/data/run")
    assert f"training data: 10 samples, 5 shards, {counted.counts['num_bytes'] / 1e6:.1f} MB in `{folder}`" in text


def test_description_name_and_tags():
    text = describe_run("demo", "python jobs/pretrain.py", TrainConfig(num_workers=(2, 8), zero_stage=3), [], "s3://b/run")
    assert text.startswith("Pretraining by the recipe `demo`, seed 0: 100,000 steps on 2 to 8 workers, ZeRO 3.")
    assert text.endswith("```\npython jobs/pretrain.py\n```")
    assert re.fullmatch(r"demo-\d{4}-\d{4}", dated_name("demo"))


def test_tags_and_the_code_version_contain_the_commit_also_of_a_submitted_job(monkeypatch, tmp_path):
    """The copy of a checkout that a job runs in has no .git folder: the commit comes from the client."""
    monkeypatch.setattr(run_metadata, "checkout_root", lambda: tmp_path)
    monkeypatch.delenv("DIFFDIS_GIT_COMMIT", raising=False)
    assert run_metadata.git_state() == ""
    assert "git_commit" not in run_tags("demo", "/run", "files-0123")

    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        return subprocess.run(["git", "-C", str(tmp_path), *name, *arguments], check=True, capture_output=True, text=True).stdout

    git("init")
    (tmp_path / "a.py").write_text("")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert run_metadata.git_state() == commit
    assert run_metadata.code_version() == f"git-{commit[:12]}"
    (tmp_path / "a.py").write_text("1")
    dirty = run_metadata.git_state()
    assert run_metadata.code_version().startswith("files-")
    shutil.rmtree(tmp_path / ".git")
    monkeypatch.setenv("DIFFDIS_GIT_COMMIT", dirty)
    tags = run_tags("demo", "/run", run_metadata.code_version())
    assert (tags["git_commit"], tags["git_dirty"], tags["mlflow.source.git.commit"]) == (commit, "true", commit)
    monkeypatch.setenv("DIFFDIS_GIT_COMMIT", commit)
    assert run_tags("demo", "/run", "")["git_dirty"] == "false"
