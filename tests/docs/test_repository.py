"""The files of the repository: one version and license everywhere, the workflow of the gate, and the documentation site."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

from tests.support.documentation import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_all_files_name_the_same_version():
    newest = re.search(r"^## (\S+) \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {newest, citation["version"], citation["preferred-citation"]["version"]} == {PROJECT["version"]}
    images = re.findall(r"diffdis-(?:cpu|cuda):([\d.]+)", (ROOT / "docs" / "clusters.md").read_text())
    assert set(images) == {PROJECT["version"]}


def test_the_license_is_the_same_everywhere():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == yaml.safe_load((ROOT / "CITATION.cff").read_text())["license"] == "Apache-2.0"


def test_the_workflow_runs_the_merge_gate():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.ranks
def test_the_site_builds_without_warnings(tmp_path):
    """Strict mode: links, anchors and cross-references resolve, and every documented object exists."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "reference.html").read_text()
    assert 'id="diffdis.pipeline.DiffDisPipeline.rank_captions"' in reference
    assert 'id="ray_platform.train.config.TrainConfig.zero_stage"' in reference
