"""Each Python block of the page about extensions is a script that runs to its end."""

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from spectralbasis.checkpoints.opening import FORMATS
from spectralbasis.comparison.nulls import NULLS
from spectralbasis.linalg.row_blocks import RowSource
from spectralbasis.study.experiments import EXPERIMENTS
from spectralbasis.training import METHODS
from spectralbasis.training.known_tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
BLOCKS = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in SECTIONS.items()}
REGISTRIES = (NULLS, EXPERIMENTS, METHODS, TASKS)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    """A folder of its own for each test; what a script registers is gone after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    formats, registries = list(FORMATS), [dict(known) for known in REGISTRIES]
    yield
    FORMATS[:] = formats
    for known, entries in zip(REGISTRIES, registries, strict=True):
        known.clear()
        known.update(entries)
    sys.modules.pop("rank_study", None)


def run(title, number=0):
    """The names that a block defines, after it ran as a script from a file of the name that its first line gives."""
    source = BLOCKS[title][number]
    named = re.match(r"# (\w+\.py)\n", source)
    script = Path(named[1] if named else "script.py")
    script.write_text(source)
    return runpy.run_path(str(script), run_name="__main__")


def test_every_block_is_run_by_a_test_below():
    expected = {"A format": 1, "A null": 1, "A task": 2, "A method": 2, "An experiment": 1, "A metric": 1}
    assert {title: len(blocks) for title, blocks in BLOCKS.items() if blocks} == expected


def test_a_format():
    names = run("A format")
    assert names["base"].names() == ("layers.0.fc.weight",)
    assert names["base"].dtype("layers.0.fc.weight") == names["tuned"]["layers.0.fc.weight"].dtype


def test_a_null():
    names = run("A null")
    assert set(names["result"].table["null"]) == {"", "shuffled"}
    assert "W0 + P ΔW with a random permutation P" in Path("comparison/index.html").read_text()
    update = torch.randn(12, 10)
    draw, rows = (
        names["shuffle_rows"](given, torch.Generator().manual_seed(1))
        for given in (update, RowSource((12, 10), update.__getitem__, update.device))
    )
    assert isinstance(rows, RowSource)
    assert torch.equal(rows[slice(2, 7)], draw[2:7])


def test_a_metric(capsys):
    run("A metric")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layers.")]
    shares = [[float(number) for number in re.findall(r"0\.\d+", line)] for line in lines]
    assert [len(found) for found in shares] == [6, 6, 6]
    assert all(0 < share < 1 for found in shares for share in found)


def test_an_experiment():
    part = run("An experiment")["content"]["experiments"]["rank"]
    assert (part["planned"], part["finished"], part["failed"]) == (10, 10, {})
    assert part["claims"][0]["runs"] == 10
    assert "An update of rank 1 leaves more overlap" in Path("study/rank.md").read_text()


@pytest.mark.slow
def test_a_task_of_images():
    assert run("A task", 1)["task"].num_labels == 2
    assert Path("adapter/tuning.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_method(number):
    parameters = run("A method", number)["tuned"].parameters
    assert 0 < parameters.backbone < parameters.model / 5


@pytest.mark.slow
@pytest.mark.usefixtures("minilm")
def test_a_task_of_texts(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for split in ("train", "test"):
        with Path(f"{split}.csv").open("w", newline="") as file:
            rows = [
                (f"The {noun} was {word}.", label)
                for noun in ("film", "meal")
                for label, word in enumerate(("bad", "good"))
            ]
            csv.writer(file).writerows([("text", "label"), *rows])
    assert run("A task")["tuned"].task == "reviews"
