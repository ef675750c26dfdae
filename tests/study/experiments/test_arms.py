"""Choosing a learning rate on one half, with one budget for every arm."""

import math

import pytest

from spectralbasis.study.contests import Arm, Contest
from spectralbasis.study.runs import Record, Results, Run
from spectralbasis.study.subjects import Subject
from tests.study.experiments.planted import conducted

SUBJECT = Subject("toy", "toy-model", ("one", "two", "three"), {"steps": 5})
RATES = (0.5, 1.5, 3.0, 6.0)
BOLD, SHY = Arm("bold", {"method": "lora"}, RATES), Arm("shy", {"method": "full"}, RATES)
CONTEST = Contest(SUBJECT, (BOLD, SHY), ("one", "two"), (5, 6))


BEST = {"lora": 3.0, "full": 1.5}


def tuned(run: Run) -> dict[str, object]:
    settings = run.settings
    selection = 1 - abs(settings["learning_rate"] - BEST[settings["method"]])
    facts = {"parameters_backbone": 10, "parameters_head": 2, "parameters_model": 100, "precision": "float32"}
    return {"selection_score": selection, "score": 0.7, "seconds_per_step": 1.0, "adapter_bytes": 8, **facts}


def test_trials_come_first_and_the_best_rate_runs_on_all_tasks_and_seeds():
    trials = CONTEST.plan(Results({}))
    assert len(trials) == 2 * 4 * 2
    assert {(run.seed, run.settings["task"]) for run in trials} == {(5, "one"), (5, "two")}
    known = conducted(CONTEST.plan, tuned)
    assert [CONTEST.chosen_rate(arm, known) for arm in CONTEST.arms] == [3.0, 1.5]
    scores = CONTEST.scores(known)
    assert len(scores) == 2 * 3 * 2
    assert set(scores.loc[scores["arm"] == "bold", "learning_rate"]) == {3.0}
    assert (scores["backbone"] == 10).all()


def test_an_arm_goes_on_when_its_own_trials_are_done():
    known = {run.key: Record(tuned(run), None, 1.0, {}, 5) for run in CONTEST.plan(Results({}))[:8]}
    counted = list(CONTEST.counted(Results(known)))
    assert {labels["arm"] for labels, _ in counted} == {"bold"}


def test_the_choice_does_not_see_the_scores_that_are_reported():
    known = conducted(CONTEST.plan, lambda run: {**tuned(run), "score": -run.settings["learning_rate"]})
    assert CONTEST.chosen_rate(BOLD, known) == 3.0


@pytest.mark.parametrize(
    ("failed", "rate"),
    [
        (lambda run: run.settings["learning_rate"] == 3.0 and run.settings["task"] == "one", 1.5),
        (lambda run: run.settings["task"] == "one", 3.0),
        (lambda run: True, None),
    ],
)
def test_a_rate_that_fails_loses_and_a_task_that_fails_has_no_say(failed, rate):
    trials = CONTEST.plan(Results({}))
    records = {run.key: Record(tuned(run), None, 1.0, {}, 5) for run in trials if not failed(run)}
    errors = {run.key: "diverged" for run in trials if failed(run)}
    assert CONTEST.chosen_rate(BOLD, Results(records, errors)) == rate


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (0.1, (0.03, 0.1, 0.3)),
        (0.3, (0.03, 0.1, 0.3, 0.9)),
        (0.9, (0.03, 0.1, 0.3, 0.9, 3.0)),
        (50.0, (0.03, 0.1, 0.3, 0.9, 3.0, 10.0)),
        (0.01, (0.003, 0.009, 0.03, 0.1, 0.3)),
    ],
)
def test_rates_go_on_while_the_best_is_at_an_end_but_not_forever(best, tried):
    arm = Arm("searching", {"method": "lora"}, (0.03, 0.1, 0.3))
    contest = Contest(SUBJECT, (arm,), ("one", "two"), (0,))

    def peaked(run: Run) -> dict[str, float]:
        return {**tuned(run), "selection_score": -abs(math.log(run.settings["learning_rate"] / best))}

    known = conducted(contest.plan, peaked)
    assert contest.tried_rates(arm, known) == pytest.approx(tried)
    assert contest.chosen_rate(arm, known) == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_rates_that_diverge_end_the_search():
    arm = Arm("searching", {"method": "lora"}, (0.03, 0.1, 0.3))
    contest = Contest(SUBJECT, (arm,), ("one",), (0,))
    records, errors = {}, {}
    for _ in range(5):
        for run in contest.plan(Results(records, errors)):
            if run.settings["learning_rate"] > 0.5:
                errors[run.key] = "training diverged"
            else:
                records[run.key] = Record(
                    {**tuned(run), "selection_score": run.settings["learning_rate"]}, None, 1, {}, 0
                )
    assert contest.tried_rates(arm, Results(records, errors)) == pytest.approx((0.03, 0.1, 0.3, 0.9))
    assert contest.chosen_rate(arm, Results(records, errors)) == 0.3


def test_a_single_rate_needs_no_trial():
    contest = Contest(SUBJECT, (Arm("given", {"method": "lora"}, (0.1,)),), ("one",), (0,))
    assert [run.settings["task"] for run in contest.plan(Results({}))] == ["one", "two", "three"]
