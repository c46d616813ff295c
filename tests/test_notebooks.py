"""The notebooks run from top to bottom, and are stored with what they showed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# `test_docs` runs the same code on few cells.
NO_UMAP = """
from pyromosaic import plot

plot.umap = lambda latent: latent.iloc[:, :2].set_axis(["UMAP 1", "UMAP 2"], axis=1)
"""


@pytest.mark.slow
@every_notebook
def test_runs(path, request):
    if "GSE126074" in path.read_text():
        request.getfixturevalue("geo_files")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_UMAP))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()


@every_notebook
def test_its_data_can_be_had_by_a_reader(path):
    """They are in the package, made by it, or fetched from a public address; other files have a substitute."""
    code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert re.search(r"\b(pbmc_mosaic|simulate)\(", code) or ("pooch.retrieve(" in code and "https://" in code)


@every_notebook
def test_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("execution" in cell.metadata for cell in notebook.cells), "no times of execution"
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) <= 3 * len(cells), "no bars of progress"
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    words = [cell.source for cell in notebook.cells]
    words += [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert not [text for text in words if re.search(r"(^|[\s'\"(])(/[a-z]\w*/|[A-Z]:\\)", text)], "no path of a machine"
    assert path.stat().st_size < 1_000_000
