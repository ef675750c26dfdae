"""Verdicts on the basis follow what was planted, over tasks and draws."""

import pytest

from spectralbasis.study.experiments import crossed
from spectralbasis.study.runs import Results
from tests.study.experiments.planted import conducted, verdicts

SETTINGS = crossed.PRESETS["cpu"]


def planted(random=0.0, trailing=0.0, by_task=0.0, by_draw=0.0):
    """Scores that other bases have above the leading directions, and how far tasks and draws differ in that."""

    def tuned(run):
        basis, task = run.settings.get("basis", "pretrained"), SETTINGS.subject.tasks.index(run.settings["task"])
        off = {"pretrained": 0.0, "random": random, "minor": trailing}[basis]
        if basis != "pretrained":
            off += by_task * (task % 3 - 1) + by_draw * (run.seed % 3 - 1)
        return {
            "score": 0.7 + 0.01 * task + off, "selection_score": 0.7, "seconds_per_step": 0.5, "adapter_bytes": 1000,
            "parameters_backbone": 40_000, "parameters_head": 770, "parameters_model": 22_000_000, "precision": "bf16",
        }  # fmt: skip

    return conducted(lambda known: crossed.plan(SETTINGS, known), tuned)


@pytest.mark.parametrize(
    ("random", "verdict"), [(0.0, "supported"), (0.006, "supported"), (-0.03, "contradicted"), (-0.0095, "undecided")]
)
def test_equality_is_judged_by_the_whole_interval(random, verdict):
    findings = crossed.analyse(SETTINGS, planted(random, by_task=0.001))
    assert verdicts(findings)["leading equals random"] == verdict
    claim = findings.claims[0]
    assert claim.primary
    assert claim.effect == pytest.approx(-random)
    assert claim.units == "12 tasks × 5 draws"
    assert claim.runs == 2 * 12 * 5 * 2  # two kinds of coefficients


def test_draws_that_differ_leave_it_undecided():
    """Over tasks alone the interval would be a point; five draws that differ by 0.03 each way say little."""
    assert verdicts(crossed.analyse(SETTINGS, planted(by_draw=0.03)))["leading equals random"] == "undecided"


def test_each_seed_has_a_draw_and_trailing_directions_belong_to_the_core_alone():
    runs = crossed.plan(SETTINGS, planted())
    drawn = [run for run in runs if run.settings.get("basis") == "random"]
    assert all(run.settings["basis_seed"] == run.seed for run in drawn)
    assert {run.seed for run in drawn} == {0, 1, 2, 3, 4}
    assert {run.settings["coefficients"] for run in runs if run.settings.get("basis") == "minor"} == {"core"}
    assert "RTE" not in {run.settings["task"] for run in runs}


def test_nothing_finished_is_undecided():
    findings = crossed.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert findings.answer == "No finished run answers this yet."
