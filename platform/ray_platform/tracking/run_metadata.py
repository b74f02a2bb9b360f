"""Names, tags and descriptions of runs, for the users who look for them in the tracker; and the version of the code."""

import hashlib
import importlib.metadata
import os
import subprocess
import time

from ray_platform.checkout import checkout_root

GIT_VARIABLE = "DIFFDIS_GIT_COMMIT"
_PACKAGES = ("diffdis", "platform", "jobs")


def dated_name(recipe: str) -> str:
    """Return a name for a run that starts now: `demo-1125-2143` (UTC)."""
    return f"{recipe}-{time.strftime('%m%d-%H%M', time.gmtime())}"


def run_tags(recipe: str, output_dir: str, code_version: str) -> dict[str, str]:
    """Return the tags by which runs are searched and grouped. MLflow's pages show `mlflow.source.*` as a run's source."""
    tags = {"recipe": recipe, "code_version": code_version, "output_dir": output_dir}
    tags |= {"mlflow.source.name": f"recipe {recipe}", "mlflow.source.type": "JOB"}
    if state := git_state():
        commit, _, dirty = state.partition("-")
        tags |= {"mlflow.source.git.commit": commit, "git_commit": commit, "git_dirty": str(bool(dirty)).lower()}
    return tags


def git_state() -> str:
    """Return the commit of this code, with `-dirty` for a checkout with changes; empty if it is unknown.

    A submitted job has no .git folder: the client sends it in the environment variable DIFFDIS_GIT_COMMIT, which
    `git describe --always --dirty --abbrev=40 --exclude '*'` prints.
    """
    if state := os.environ.get(GIT_VARIABLE, ""):
        return state
    root = checkout_root()
    if root is None or not (root / ".git").exists():
        return ""
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def append_command(description: str, command: str) -> str:
    """Return the description (Markdown) followed by the command line that started the run."""
    return f"{description}\n\n```\n{command}\n```" if command else description


def code_version() -> str:
    """Return `git-<commit>` for a checkout without changes, `files-<digest of the sources>` for other checkouts, and
    `version-<number>` for an installed wheel."""
    root = checkout_root()
    if root is None:
        return f"version-{importlib.metadata.version('diffdis-platform')}"
    if (state := git_state()) and not state.endswith("-dirty"):
        return f"git-{state[:12]}"
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"
