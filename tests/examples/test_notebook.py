"""The notebook runs from its first cell to its last, and is kept without what it printed."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_output(stored):
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert cells
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_it_runs(stored, tmp_path):
    client = NotebookClient(stored, timeout=600, startup_timeout=300, kernel_name="python3")
    ran = client.execute(cwd=str(tmp_path))
    printed = "".join(
        output.get("text", "")
        for cell in ran.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    scores = [float(score) for score in re.findall(r"odd or even: (\d\.\d+)", printed)]
    assert len(scores) == 2
    assert min(scores) > 0.7
    assert re.search(r"stability: (supported|contradicted|undecided)", printed)
    assert float(re.search(r"logits differ by (\S+)", printed)[1]) < 1e-4
