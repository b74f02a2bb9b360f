"""Names, tags and descriptions of runs, for the users who look for them in the tracker; and the version of the code."""

import hashlib
import importlib.metadata
import subprocess
import time

from ray_platform.checkout import checkout_root

_PACKAGES = ("diffdis", "platform", "jobs")


def dated_name(recipe: str) -> str:
    """Return a name for a run that starts now: `demo-1125-2143` (UTC)."""
    return f"{recipe}-{time.strftime('%m%d-%H%M', time.gmtime())}"


def run_tags(recipe: str, output_dir: str, code_version: str) -> dict[str, str]:
    """Return the tags by which runs are searched and grouped. MLflow's pages show `mlflow.source.*` as a run's source."""
    tags = {"recipe": recipe, "code_version": code_version, "output_dir": output_dir}
    tags |= {"mlflow.source.name": f"recipe {recipe}", "mlflow.source.type": "JOB"}
    if code_version.startswith("git-"):
        tags["mlflow.source.git.commit"] = code_version.removeprefix("git-")
    return tags


def append_command(description: str, command: str) -> str:
    """Return the description (Markdown) followed by the command line that started the run."""
    return f"{description}\n\n```\n{command}\n```" if command else description


def code_version() -> str:
    """Return `git-<commit>` for a checkout without changes, `files-<digest of the sources>` for other checkouts (a submitted job
    has no .git folder), and `version-<number>` for an installed wheel."""
    root = checkout_root()
    if root is None:
        return f"version-{importlib.metadata.version('diffdis-platform')}"
    try:
        git = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]
        if not subprocess.run(git, capture_output=True, text=True, check=True).stdout:
            commit = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
            return f"git-{subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        pass
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"
