"""Whether likeness predicts transfer follows what was planted."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from spectralbasis.study.experiments import task_sharing, task_similarity
from spectralbasis.study.runs import Results, with_needs
from tests.study.experiments.planted import results, verdicts

SETTINGS = task_similarity.PRESETS["cpu"]
(SUBJECT,) = SETTINGS.sharing.finetuning.subjects
TASKS = SUBJECT.tasks
PLACES = np.array([0.0, 1.0, 3.0, 7.0, 15.0])
LIKENESS = -np.abs(PLACES[:, None] - PLACES[None])


def planted(sign):
    """Tasks lie on a line; what a start gains is their nearness, and each task gains from every start alike."""

    def measurements(run):
        if run.action != "compare":
            return pd.DataFrame()
        tasks = run.settings["tasks"]
        rows = [(TASKS.index(a), TASKS.index(b)) for n, a in enumerate(tasks) for b in tasks[n + 1 :]]
        return pd.DataFrame(
            [{"task_a": TASKS[i], "task_b": TASKS[j], "value": LIKENESS[i, j], "update_cosine": 0.5} for i, j in rows]
        )

    def result(run):
        if run.action == "similarity":
            return {"cosines": LIKENESS.tolist()}
        if run.action != "tune" or "start" not in run.needs:
            return {"score": 0.5, "selection_score": 0.5}
        i, j = TASKS.index(run.needs["start"].settings["task"]), TASKS.index(run.settings["task"])
        gain = sign * 0.01 * LIKENESS[i, j] + 0.5 * j
        return {"score": 0.5 + gain, "selection_score": 0.5 + gain + 0.001 * run.seed}

    runs = with_needs(task_similarity.plan(SETTINGS, Results({})))
    return results(runs, result, measurements)


@pytest.mark.parametrize(("sign", "expected"), [(1, "supported"), (-1, "contradicted")])
def test_transfer_that_follows_likeness(sign, expected):
    findings = task_similarity.analyse(SETTINGS, planted(sign))
    found = verdicts(findings)
    assert found["MiniLM: cosine of coefficients predicts transfer"] == expected
    assert found["MiniLM: overlap of leading directions predicts transfer"] == expected
    assert found["MiniLM: cosine of updates predicts transfer"] == "undecided"
    claim = next(claim for claim in findings.claims if "coefficients" in claim.name)
    assert sign * claim.effect > 0.7
    assert claim.p_value <= 0.05
    assert claim.runs == 60


def test_a_pair_that_makes_the_correlation_is_named():
    """Of ranks that go against each other, one pair is at the top of both."""
    rng = np.random.default_rng(0)
    gains = rng.normal(size=(5, 5))
    own = task_similarity._by_target(gains)
    likeness = -own
    best = tuple(np.argwhere(own == off_diagonal(own)[0].max())[0])
    likeness[best] = 10.0
    row = task_similarity._without_each_pair(SUBJECT, "cosine of updates", likeness, gains).iloc[0]
    assert row["claim"] == "MiniLM: cosine of updates predicts transfer"
    assert row["rho"] == pytest.approx(stats.spearmanr(*off_diagonal(likeness, own))[0])
    assert row["lowest"] == pytest.approx(-1)
    assert row["without the pair"] == f"{TASKS[best[0]]} → {TASKS[best[1]]}"
    assert row["highest"] > row["rho"]


def off_diagonal(*tables):
    return [table[~np.eye(len(table), dtype=bool)] for table in tables]


def test_gains_by_hand():
    table = task_similarity.analyse(SETTINGS, planted(1)).tables["Pairs of tasks"]
    row = table[(table["start"] == TASKS[0]) & (table["task"] == TASKS[2])].iloc[0]
    assert row["gain"] == pytest.approx(0.5 * 2 + 0.01 * LIKENESS[0, 2] + 0.0005 * 1)
    own = table[table["task"] == TASKS[2]]["gain"]
    assert row["gain less the task's mean"] == pytest.approx(row["gain"] - own.mean())
    assert len(table) == 20


def test_nothing_finished():
    assert set(verdicts(task_similarity.analyse(SETTINGS, Results({}))).values()) == {"undecided"}


def test_the_same_finetuned_models_are_taken():
    compared = set(task_sharing.plan(task_sharing.PRESETS["cpu"], Results({})))
    assert next(run for run in task_similarity.plan(SETTINGS, Results({})) if run.action == "compare") in compared
