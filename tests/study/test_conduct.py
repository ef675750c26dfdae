"""A study does its experiments' runs, goes on where it was stopped, and writes what they show."""

import json
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from spectralbasis.errors import InputError
from spectralbasis.report import write_study_report
from spectralbasis.report.study_page import devices_used
from spectralbasis.study.claims import Findings, conclude
from spectralbasis.study.conduct import study, time_left
from spectralbasis.study.estimates import Interval
from spectralbasis.study.experiments import EXPERIMENTS
from spectralbasis.study.pages import Part, page
from spectralbasis.study.runs import DATABASE, Run, Timing
from tests.study import planted_experiment


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for known in reversed(list(EXPERIMENTS)):
        monkeypatch.delitem(EXPERIMENTS, known)
    monkeypatch.setitem(EXPERIMENTS, "planted", planted_experiment.EXPERIMENT)


def test_a_second_stage_follows_from_the_first(tmp_path):
    content = study("planted", preset="quick", output=tmp_path, progress=False)
    part = content["experiments"]["planted"]
    assert (part["planned"], part["finished"], part["failed"]) == (5, 5, {})
    assert part["claims"][0]["effect"] == 3
    assert part["tables"]["All values"]["data"] == [[1, "<b>a|b</b>"], [3, "<b>a|b</b>"], [2, "<b>a|b</b>"],
                                                    [3, "<b>a|b</b>"], [3, "<b>a|b</b>"]]  # fmt: skip


def test_exported_rows_are_enough_to_analyse(tmp_path):
    before = study("planted", preset="quick", output=tmp_path, progress=False)
    (tmp_path / DATABASE).unlink()
    after = study("planted", preset="quick", output=tmp_path, analyse_only=True, trust=True, progress=False)
    assert after == before


def test_an_unfinished_study_says_so(tmp_path):
    part = study("planted", preset="quick", output=tmp_path, analyse_only=True, progress=False)["experiments"][
        "planted"
    ]
    assert (part["planned"], part["finished"]) == (3, 0)
    assert part["claims"][0]["verdict"] == "undecided"


def test_failures_are_listed_with_their_reason(tmp_path):
    part = study("planted", preset="cpu", output=tmp_path, progress=False)["experiments"]["planted"]
    ((run, reason),) = part["failed"].items()
    assert reason == "no such <task>"
    assert run.startswith("tests.study.runs.planted:act no such <task>, value 9, seed 0 (")
    assert "no such \\<task\\>" in (tmp_path / "planted.md").read_text()


def test_pages_say_on_which_devices_runs_were_done(tmp_path):
    content = study("planted", preset="quick", output=tmp_path, progress=False)
    assert list(content["experiments"]["planted"]["devices"].values()) == [5]
    assert "5 of 5 runs, 0.0 hours of computing on " in (tmp_path / "planted.md").read_text()
    assert devices_used({"cpu": 3, "GPU <1>": 2}) == " on cpu (3 runs) and GPU <1> (2 runs)"
    assert devices_used({}) == ""


def test_pages_hold_names_as_text(tmp_path):
    study("planted", preset="cpu", output=tmp_path, progress=False)
    markdown = (tmp_path / "planted.md").read_text()
    assert "| value\\| | who |" in markdown
    assert "\\<b\\>a\\|b\\</b\\>" in markdown
    assert "| +2.0 (+0.50 to +3.5) points | 0.01 | 4 \\<values\\> |" in markdown
    html = (tmp_path / "index.html").read_text()
    assert "Is the &lt;best&gt; value above zero?" in html
    assert "<b>a|b</b>" not in html
    assert "<task>" not in html


def test_a_page_answers_first_and_the_overview_has_every_answer(tmp_path):
    content = study("planted", preset="quick", output=tmp_path, progress=False)
    answer = content["experiments"]["planted"]["answer"]
    assert answer == "Supported: The best value is above zero. (+3.0 points (+0.50 to +3.5); 5 <values>)"
    page = (tmp_path / "planted.md").read_text().split("\n\n")
    assert page[:2] == ["# Planted", "Is the \\<best\\> value above zero?"]
    assert page[2].startswith("**Supported: The best value")
    assert page[3] == "## Values"
    assert (
        page.index("## Values")
        < page.index("## Claims")
        < page.index("## How to read it")
        < page.index("## All values")
    )
    row = (tmp_path / "index.md").read_text().split("\n\n")[2].splitlines()[-1]
    assert row.startswith("| [Planted](planted.md) | Supported: The best value is above zero.")
    assert row.endswith("| A value below. |")
    assert "+3.0 points" in (tmp_path / "index.html").read_text()


def test_words_are_explained_where_they_are_used():
    claim = conclude("a", "Updates lie in the core.", Interval(1.0, 0.5, 1.5, 0.01), unit="halvings", would_change="",
                     runs=2, units="2 tasks")  # fmt: skip
    part = Part("a", "A", "Q?", 2, 2, {}, 1.0, {}, Findings([claim], {"T": pd.DataFrame({"held": [1.0]})}))
    shown = page(part, {"command": "study all", "commit": "x"})
    explained = [line.split("**")[1] for line in shown.splitlines() if line.startswith("- **")]
    assert explained == ["halvings", "held", "core"]
    assert "## Exploration" in shown
    assert "## Claims" not in shown


def test_the_page_can_be_written_again(tmp_path):
    study("planted", preset="quick", output=tmp_path, progress=False)
    page = (tmp_path / "index.html").read_text()
    (tmp_path / "index.html").unlink()
    assert write_study_report(tmp_path).read_text() == page
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        write_study_report(tmp_path)


def test_results_of_other_experiments_stay(tmp_path, monkeypatch):
    study("planted", preset="quick", output=tmp_path, progress=False)
    monkeypatch.setitem(EXPERIMENTS, "other", replace(planted_experiment.EXPERIMENT, name="other"))
    study("other", preset="quick", output=tmp_path, progress=False)
    assert set(json.loads((tmp_path / "results.json").read_text())["experiments"]) == {"planted", "other"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"preset": "huge"}, "no preset 'huge'; it has quick, cpu"), ({"data": "/nowhere"}, "does not exist")],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        study("planted", output=tmp_path, progress=False, **arguments)


def test_time_left_is_that_of_the_most_similar_runs():
    def timing(seconds: float, **settings: str) -> Timing:
        return Timing(Run("tune", settings).kind, seconds)

    large = [timing(seconds, model="large", task="RTE", method="full") for seconds in (600, 1200, 6000)]
    timings = [*large, timing(300, model="large", task="RTE", method="lora"), timing(60, model="small", task="RTE")]

    def left(runs: int = 1, at_once: int = 1, action: str = "tune", **settings: Any) -> str:
        return time_left([Run(action, settings)] * runs, timings, at_once)

    assert left(method="full", task="RTE", model="large", rate=0.1) == "about 20 min"
    assert left(runs=2, at_once=4, method="full", task="RTE", model="large") == "about 10 min"
    assert left(runs=12, model="large", task="RTE", method="lora") == "about 60 min"
    assert left(runs=60, model="large", task="RTE", method="lora") == "about 5.0 h"
    assert left(model="large", task="CoLA", method="lora") == "about 15 min"
    assert left(model="tiny") == left(action="compare") == "about 10 min"
    assert time_left([Run("tune", {})], [], at_once=1) == "an unknown time"
