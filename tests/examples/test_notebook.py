"""The notebook runs from its first cell to its last, and is kept with what it printed."""

import re
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def text_of(output):
    if output.get("name") == "stderr":
        return ""
    return output.get("text") or output["data"]["text/plain"]


def printed(notebook):
    """What each code cell printed to stdout or returned, as text."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(map(text_of, cell)) for cell in outputs]


def check(texts):
    whole = "\n".join(texts)
    scores = [float(score) for score in re.findall(r"odd or even: (\d\.\d+)", whole)]
    assert len(scores) == 2
    assert min(scores) > 0.7
    assert re.search(r"stability: (supported|contradicted|undecided)", whole)
    assert float(re.search(r"logits differ by (\S+)", whole)[1]) < 1e-4


def test_it_is_kept_with_what_it_printed(stored):
    check(printed(stored))
    kinds = {output.get("name", output.output_type) for cell in stored.cells for output in cell.get("outputs", ())}
    assert kinds == {"stdout", "execute_result"}


@pytest.mark.slow
def test_it_runs_and_prints_as_much(stored, tmp_path):
    client = NotebookClient(deepcopy(stored), timeout=600, startup_timeout=300, kernel_name="python3")
    ran = client.execute(cwd=str(tmp_path))
    check(printed(ran))
    assert [bool(text) for text in printed(ran)] == [bool(text) for text in printed(stored)]
