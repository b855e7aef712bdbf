"""Every notebook runs from top to bottom, and holds no output in git."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
# The kernel's own libraries warn about each other; the notebook's code runs in another process.
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    errors = [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert errors == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_holds_no_output(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert [c.id for c in notebook.cells if c.cell_type == "code" and (c.outputs or c.execution_count)] == []


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
