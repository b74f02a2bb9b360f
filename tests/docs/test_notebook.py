"""The notebook of the documentation runs on an exported model, and has no saved output."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.documentation import ROOT

NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_has_no_output(notebook):
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]


@pytest.mark.slow
def test_all_cells_run(notebook, tiny_model, tmp_path, monkeypatch):
    import torch

    from diffdis.config import ObjectiveConfig
    from diffdis.task import DiffDisTask

    torch.manual_seed(0)
    task = DiffDisTask(tiny_model, ObjectiveConfig())
    task.pipeline(task.module.state_dict()).save_pretrained(tmp_path / "export")
    monkeypatch.setenv("DIFFDIS_EXPORT", str(tmp_path / "export"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'platform'}:{ROOT}")
    executed = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in executed.cells if cell.cell_type == "code"]
    images = [output for cell in outputs for output in cell if "image/png" in output.get("data", {})]
    assert len(images) == 3, "a grid, a sorted grid, an image"
    assert any("tensor" in output.get("data", {}).get("text/plain", "") for output in outputs[2])
