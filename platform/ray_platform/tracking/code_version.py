"""Version of the code that wrote a checkpoint."""

import hashlib
import importlib.metadata
import subprocess

from ray_platform.checkout import checkout_root

_FOLDERS = ("diffdis", "platform", "jobs")


def code_version() -> str:
    """Return the version of this code.

    `git-<commit>` for a checkout without changes, `files-<digest of the sources>` for other checkouts (a submitted job has no
    .git folder), and `version-<number>` for an installed wheel.
    """
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
    for folder in _FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"
