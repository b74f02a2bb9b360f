"""Whether this code runs from a checkout of the repository or from an installed wheel."""

from pathlib import Path


def checkout_root() -> Path | None:
    """Return the root of the checkout that this code runs from; None for an installed wheel."""
    folder = Path(__file__).resolve().parents[1]
    return folder.parent if folder.name == "platform" and (folder.parent / "diffdis").is_dir() else None
