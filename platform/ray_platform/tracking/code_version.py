"""Which code made a checkpoint."""

import hashlib
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_PACKAGES = ("diffdis", "platform", "jobs")


def code_version() -> str:
    """`git-<commit>` of a checkout without changes, else `files-<digest of the sources>`: a submitted job has no .git."""
    try:
        git = ["git", "-C", str(_ROOT), "status", "--porcelain", "--untracked-files=no"]
        if not subprocess.run(git, capture_output=True, text=True, check=True).stdout:
            commit = ["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]
            return f"git-{subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        pass
    digest = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{file.relative_to(_ROOT)}\n".encode() + file.read_bytes())
    return f"files-{digest.hexdigest()[:12]}"
