"""Keys of units of work: everything that rows depend on, and what a report says about units that were computed earlier."""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

from diffdis_platform.evaluation import units
from diffdis_platform.evaluation.models import open_judge
from diffdis_platform.evaluation.units import ROW_LIBRARIES, ROW_PACKAGES, build_unit, count_units, rows_version
from ray_platform.contracts import ConfigError, UnitOrigin
from ray_platform.report.evaluation import evaluation_page
from tests.count_structure import imports, module_name, python_files
from tests.support.evaluation_details import evaluation
from tests.support.html_page import Page
from tests.support.tiny_checkpoints import save_clip

ROOT = Path(__file__).parents[2]
# What computes rows, and the modules outside of ROW_PACKAGES that it may use: they read and name things, and compute no value.
WORK = ("unit_work", "shards", "image_files", "torchvision_folders")
SCORERS = ("diffdis.scorers", "diffdis.feature_networks")
WITHOUT_VALUES = {
    *("contracts", "json_values", "names", "object_store", "placement", "ray_internals", "redaction", "retry"),
    *("storage", "storage_config", "storage_errors", "formats", "units"),
}
# Their distributions load bytes as they are stored, or report progress. SciPy reads labels, which are part of a set's digest.
LIBRARIES_WITHOUT_VALUES = {
    *("aiobotocore", "aiohttp", "botocore", "fsspec", "huggingface_hub", "ray", "safetensors", "scipy", "tqdm"),
}


@pytest.fixture(scope="module")
def row_modules() -> dict[str, ast.AST]:
    """The syntax trees of the modules that compute rows, and of all that they import, by name."""
    trees = {module_name(ROOT, path): ast.parse(path.read_text()) for path in python_files(ROOT, "diffdis", "platform")}
    needed, remaining = dict[str, ast.AST](), [*SCORERS, *(f"ray_platform.evaluate.{name}" for name in WORK)]
    while remaining:
        if (name := remaining.pop()) not in needed:
            needed[name] = trees[name]
            remaining += imports(trees[name], set(trees))
    return needed


def test_the_version_of_the_code_covers_every_module_that_computes_rows(row_modules):
    outside = {name for name in row_modules if not any(name == row or name.startswith(f"{row}.") for row in ROW_PACKAGES)}
    assert outside <= {f"ray_platform.{name}" for name in WITHOUT_VALUES}


def test_the_version_of_the_code_covers_every_library_that_computes_rows(row_modules):
    packages = set()
    for node in (node for tree in row_modules.values() for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.partition(".")[0])
    packages -= {*sys.stdlib_module_names, "diffdis", "ray_platform"}
    distributions = importlib.metadata.packages_distributions()
    used = {distribution for package in packages for distribution in distributions[package]}
    assert used - LIBRARIES_WITHOUT_VALUES == set(ROW_LIBRARIES) - {"sentencepiece", "tokenizers"}  # which transformers uses


def test_a_change_of_the_code_gives_every_unit_another_key(monkeypatch, tmp_path):
    package = tmp_path / "diffdis"
    package.mkdir()
    (package / "__init__.py").write_text("")
    before = build_unit("group", "unit", 1.0, "work", data="digest").key
    assert build_unit("group", "unit", 1.0, "work", data="digest").key == before
    versions = set()
    for source in ("scale = 1\n", "scale = 2\n"):
        (package / "scorer.py").write_text(source)
        monkeypatch.setattr(units.diffdis, "__file__", str(package / "__init__.py"))
        rows_version.cache_clear()
        versions |= {rows_version(), build_unit("group", "unit", 1.0, "work", data="digest").key}
    monkeypatch.undo()
    rows_version.cache_clear()
    assert len(versions) == 4
    assert before not in versions
    assert build_unit("group", "unit", 1.0, "work", data="digest").key == before


def test_a_report_says_which_units_were_computed_earlier():
    origins = [None, UnitOrigin("git-a", "2026-11-02T10:00:00"), UnitOrigin("git-b", "2026-11-01T10:00:00")]
    counts = count_units([*origins, UnitOrigin("git-a", "2026-11-01T09:00:00")])
    assert (counts["num_units"], counts["num_reused"]) == (4, 3)
    assert counts["reused"][0] == {
        "code_version": "git-a", "num_units": 2, "oldest": "2026-11-01T09:00:00", "newest": "2026-11-02T10:00:00",
    }  # fmt: skip
    text = Page(evaluation_page(evaluation() | {"units": counts})).text
    assert "3 of 4 units of work were computed earlier: 2 by code git-a, 2026-11-01 09:00:00 to 2026-11-02 10:00:00; 1" in text
    assert "computed earlier" not in Page(evaluation_page(evaluation() | {"units": count_units([None])})).text


def test_a_judge_that_cannot_be_opened_is_reported_before_the_work(tmp_path):
    folder = save_clip(tmp_path / "judge")
    before = open_judge(str(folder)).digest
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\0\0\0\0")
    assert open_judge(str(folder)).digest != before
    weights.write_bytes(content[:2000])
    with pytest.raises(ConfigError, match=r"quality\.clip: .* cannot be opened"):
        open_judge(str(folder))


def test_a_tokenizer_whose_library_is_missing_is_reported_before_the_work(tmp_path, monkeypatch):
    def load(*_, **__):
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr("diffdis.text_encoder.AutoTokenizer.from_pretrained", load)
    with pytest.raises(ConfigError, match=r"quality\.clip: .* cannot be opened .*SentencePiece"):
        open_judge(str(save_clip(tmp_path / "judge")))
