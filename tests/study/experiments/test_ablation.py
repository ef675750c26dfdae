"""Verdicts on bases follow what was planted."""

import math
from dataclasses import replace

import pandas as pd
import pytest

from spectralbasis.study.experiments import ablation
from spectralbasis.study.runs import Record, Results, Run, with_needs
from tests.study.experiments.planted import conducted, verdicts

WHOLE = ablation.PRESETS["cpu"]
SETTINGS = ablation.Settings(tuple(replace(part, cells=part.cells[:2]) for part in WHOLE.parts))


FACTS = {
    "seconds_per_step": 0.1, "parameters_backbone": 100, "parameters_head": 10, "parameters_model": 1000,
    "adapter_bytes": 10, "precision": "float32",
}  # fmt: skip


def basis_of(run: Run) -> str:
    """What an arm calls its basis."""
    if "basis" not in run.needs:
        return run.settings["basis"]
    made = run.needs["basis"]
    if made.settings["kind"] == "checkpoint":
        return (
            "scratch" if made.needs["checkpoint"].settings["task"] == run.settings["task"] else "another task's model"
        )
    own = made.settings["tasks"] == [run.settings["task"]]
    return "curvature" if own else ablation.CURVATURE[1 if len(made.settings["tasks"]) == 1 else 2]


def planted(gains: dict[str, float], coverage: dict[str, float]) -> Results:
    """Scores that differ from those of random directions by the gain of the basis, and shares of gradients."""

    def tuned(run: Run) -> dict[str, float]:
        if run.action == "gradient_coverage":
            return {}
        score = 0.7 + gains.get(basis_of(run), 0.0) + 0.001 * run.seed * len(run.settings["task"])
        return {**FACTS, "score": score, "selection_score": score}

    known = conducted(lambda found: ablation.plan(SETTINGS, found), tuned)
    records = {
        run.key: Record({}, shares(part, coverage), 1.0, {}, 0)
        for part in SETTINGS.parts
        for run in (part.coverage(task) for task in part.subject.tasks)
    }
    return Results({**known._records, **records})


def shares(part: ablation.Part, coverage: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"basis": basis, "k": cell.k, "form": cell.mode, "quantity": quantity, "value": coverage.get(basis, 0.001)}
            for cell in part.cells
            for basis in cell.bases
            for quantity in ablation.QUANTITIES
        ]
    )


GAINS = {"pretrained": 0.04, "minor": 0.0, "curvature": 0.02, "curvature of another task": 0.06}


def test_bases_that_differ():
    found = verdicts(ablation.analyse(SETTINGS, planted(GAINS, GAINS)))
    assert found["pretrained against random"] == found["pretrained against minor"] == "supported"
    assert found["pretrained against scratch"] == "supported"
    assert found["curvature against pretrained"] == "contradicted"
    assert found["curvature of another task against pretrained"] == "supported"
    assert found["pretrained equals random"] == "contradicted"
    assert found["gradient coverage predicts scores"] == "supported"


def test_bases_that_do_not_differ_and_gradients_that_do():
    found = verdicts(ablation.analyse(SETTINGS, planted({}, GAINS)))
    assert {verdict for name, verdict in found.items() if " equals " in name} == {"supported"}
    assert {verdict for name, verdict in found.items() if " equals " not in name} == {"undecided"}


def test_gradients_that_mislead():
    against = {basis: 0.1 - GAINS.get(basis, 0.0) for basis in ablation.ALL_BASES}
    found = verdicts(ablation.analyse(SETTINGS, planted(GAINS, against)))
    assert found["gradient coverage predicts scores"] == "contradicted"


@pytest.mark.parametrize(("best", "verdict"), [(1e-2, "supported"), (3e-1, "contradicted"), (3e-2, "undecided")])
def test_the_rates_of_curvature_and_of_random_directions_are_compared(best, verdict):
    def tuned(run: Run) -> dict[str, float]:
        if run.action == "gradient_coverage":
            return {}
        wanted = best if basis_of(run) == "curvature" else 3e-2
        score = 0.7 - 0.1 * abs(math.log(run.settings["learning_rate"] / wanted))
        return {**FACTS, "score": score, "selection_score": score}

    known = conducted(lambda found: ablation.plan(WHOLE, found), tuned)
    assert verdicts(ablation.analyse(WHOLE, known))["curvature takes smaller rates"] == verdict


def test_cells_in_common_are_no_independent_evidence():
    """Leading directions win in one cell and lose in the other by as much on every task: tasks alone would be sure."""

    def tuned(run: Run) -> dict[str, float]:
        if run.action == "gradient_coverage":
            return {}
        gain = {"core": 0.03, "diagonal": -0.01}[run.settings["coefficients"]] * (basis_of(run) == "pretrained")
        return {**FACTS, "score": 0.7 + gain, "selection_score": 0.7}

    findings = ablation.analyse(SETTINGS, conducted(lambda found: ablation.plan(SETTINGS, found), tuned))
    claim = next(claim for claim in findings.claims if claim.name == "pretrained against random")
    assert (claim.verdict, claim.units) == ("undecided", "7 tasks × 4 cells (14 means)")
    assert claim.effect == pytest.approx(0.01)
    others = findings.tables["Other units for the same differences"].set_index(["difference", "over"])
    assert others.loc[("pretrained against random", "tasks"), "low"] == pytest.approx(0.01)
    assert others.loc[("pretrained against random", "cells"), "low"] < 0


def test_the_figure_has_a_point_for_each_cell_and_task():
    findings = ablation.analyse(SETTINGS, planted({"pretrained": 0.04}, {}))
    first = next(iter(findings.figures.values()))
    assert sum(len(trace.x) for trace in first.data) == 2 * 5 + 2 * 2
    assert {round(x, 9) for trace in first.data for x in trace.x} == {0.04}


def test_without_curvature_its_bases_do_not_carry_the_correlation():
    """Curvature alone holds more and scores less; among the others, what holds more scores more."""
    coverage = {"curvature": 0.5, "curvature of another task": 0.4, "curvature of several tasks": 0.45,
                "pretrained": 0.03, "random": 0.02, "minor": 0.01}  # fmt: skip
    gains = {"curvature": -0.3, "curvature of another task": -0.1, "curvature of several tasks": -0.2,
             "pretrained": 0.02, "random": 0.01, "minor": 0.0, "scratch": -0.01}  # fmt: skip
    claims = {claim.name: claim for claim in ablation.analyse(SETTINGS, planted(gains, coverage)).claims}
    assert claims["gradient coverage predicts scores"].effect < 0.3
    assert claims["gradient coverage predicts scores, without curvature"].effect > 0.9
    assert claims["gradient coverage predicts scores, without curvature"].stated == "after"


@pytest.mark.parametrize("preset", ["cpu", "paper"])
def test_each_seed_draws_its_own_random_directions_unless_rows_are_of_one_draw(preset):
    for part in ablation.PRESETS[preset].parts:
        contest = part.contest(part.cells[0])
        for arm in contest.arms:
            run = arm.run(contest.subject, contest.subject.tasks[0], 0.01, 2)
            drawn = arm.name == "random" and preset == "paper"
            assert run.settings.get("basis_seed") == (2 if drawn else None)


def test_draws_are_clusters_too():
    scores = pd.DataFrame(
        {"subject": "m", "cell": cell, "task": task, "seed": seed, "better": 0.1 * (seed - 1), "worse": 0.0}
        for cell in ("c", "d") for task in ("a", "b", "e") for seed in (0, 1, 2)
    )  # fmt: skip
    (one, units), (several, _) = (ablation.compare_cells(scores, drawn) for drawn in (True, False))
    assert units == "3 tasks × 2 cells × 3 seeds (18 means)"
    assert one.high > 0.1
    assert several.high == pytest.approx(0, abs=1e-12)


def test_a_cell_compares_equal_numbers_with_equally_many_rates():
    part = WHOLE.parts[0]
    for cell in part.cells:
        arms = part.contest(cell).arms
        assert len({arm.learning_rates for arm in arms}) == 1
        settings = [{key: value for key, value in arm.settings.items() if key != "basis"} for arm in arms]
        assert all(each == settings[0] for each in settings)


def test_bases_are_made_of_what_they_are_named_after():
    part = WHOLE.parts[0]
    task, rest = part.subject.tasks[0], list(part.subject.tasks[1:])
    own, other, several = (part.basis(name, task) for name in ablation.CURVATURE)
    assert (own.settings["tasks"], other.settings["tasks"]) == ([task], rest[:1])
    assert sorted(several.settings["tasks"]) == sorted(rest)
    scratch = part.basis("scratch", task).needs["checkpoint"]
    assert [run.action for run in with_needs([scratch])] == ["initialise", "tune"]
    pretraining = part.subject.model
    assert scratch.needs["model"] != pretraining.needs["model"]
    assert part.basis("another task's model", task).needs["checkpoint"].needs["model"] == pretraining


@pytest.mark.parametrize("preset", ablation.PRESETS)
def test_none_of_the_runs_concludes_nothing(preset):
    findings = ablation.analyse(ablation.PRESETS[preset], Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
