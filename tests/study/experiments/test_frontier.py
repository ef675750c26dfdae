"""The frontier's recipes are chosen without the reported scores, and its verdicts follow what was planted."""

import pytest

from spectralbasis.study.experiments import frontier
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import MINILM_TASKS
from tests.study.experiments.planted import conducted, verdicts

SETTINGS = frontier.PRESETS["cpu"]
COUNTS = {"full": 22_000_000, "lora": 42_240}
SPREAD = {task: 0.002 * (number % 3 - 1) for number, task in enumerate(MINILM_TASKS.tasks)}
CONSTANT = {"RTE": 0.9}
"""No arm is above it."""


def of(run: Run) -> str:
    """Whose run it is: a method, or a form of coefficients."""
    return run.settings.get("coefficients", run.settings["method"])


def planted(test: dict[str, float], selection: dict[str, float]) -> Results:
    """Mean scores of arms on the test sets and on the selection examples; RTE is at chance."""

    def tuned(run: Run) -> dict[str, object]:
        task, arm = run.settings["task"], of(run)
        return {
            "score": test.get(arm, 0.7) + SPREAD[task] * (arm != "full") + 0.001 * run.seed,
            "selection_score": selection.get(arm, 0.7), "seconds_per_step": 0.5, "adapter_bytes": 1000,
            "parameters_backbone": COUNTS.get(arm, 40_000), "parameters_head": 770, "parameters_model": 22_000_000,
            "precision": "bf16", "constant_score": CONSTANT.get(task, 0.5),
        }  # fmt: skip

    return conducted(lambda known: frontier.plan(SETTINGS, known), tuned)


def test_the_recipe_is_chosen_by_the_selection_examples_alone():
    known = planted(test={"core": 0.9, "band": 0.6}, selection={"core": 0.6, "band": 0.9})
    assert [arm.name for arm in SETTINGS.primary(known).arms] == ["full", "lora r=1", "band of all", "band of 190"]
    shown = frontier.analyse(SETTINGS, known).tables["Recipes on the selection examples"].set_index("arm")
    assert set(shown.loc[["core k=33"], "selection_score"]) == {0.6}


@pytest.mark.parametrize(
    ("band", "verdict"), [(0.80, "supported"), (0.793, "supported"), (0.70, "contradicted"), (0.79, "undecided")]
)
def test_verdicts_follow_the_margin_over_tasks(band, verdict):
    arms = {"full": 0.80, "lora": 0.80, "band": band}
    findings = frontier.analyse(SETTINGS, planted(arms, {"band": 0.8}))
    found = verdicts(findings)
    assert next(iter(found)) == "not below full finetuning (band of all against full)"
    assert found["not below full finetuning (band of all against full)"] == verdict
    claim = findings.claims[1]
    assert claim.name == "not below LoRA of equal size (band of all against lora r=1)"
    assert claim.effect == pytest.approx(band - 0.80)
    assert claim.runs == 2 * 12 * 3  # all tasks but the one at chance


def test_tasks_at_chance_are_shown_apart_and_do_not_count():
    findings = frontier.analyse(SETTINGS, planted({"full": 0.8, "lora": 0.8}, {}))
    assert "RTE" not in findings.tables["Scores"]
    assert "RTE" in findings.tables["Tasks on which every arm is at chance"]


def test_the_search_is_short_and_scores_no_test_example():
    plan = frontier.plan(SETTINGS, Results({}))
    searched = [run for run in plan if run.settings["select_on"] == "train alone"]
    assert {run.settings["steps"] for run in searched} == {SETTINGS.search_steps}
    assert {run.settings["task"] for run in searched} == set(SETTINGS.selection_tasks)
    assert len(searched) == 3 * 4 * len(SETTINGS.recipes + SETTINGS.halves)
    chosen = frontier.analyse(SETTINGS, planted({}, {"band": 0.8})).tables["Recipes on the selection examples"]
    assert set(zip(chosen["group"], chosen["steps"], strict=True)) == {
        ("reference", 600), ("recipe", 200), ("half", 200), ("chosen", 600),
    }  # fmt: skip


def test_nothing_finished_is_undecided():
    findings = frontier.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    first, *_, last = frontier.plan(SETTINGS, Results({}))
    assert (first.settings["steps"], last.settings["steps"]) == (SETTINGS.search_steps, 600)


def test_no_mean_is_shown_of_an_arm_that_lacks_tasks():
    known = planted({"full": 0.8, "lora": 0.8}, {})
    few = Results({
        run.key: record
        for run in frontier.plan(SETTINGS, known)
        if (record := known.get(run)) is not None and run.settings["task"] in SETTINGS.selection_tasks
    })  # fmt: skip
    assert frontier.analyse(SETTINGS, few).tables["Scores"]["mean"].isna().all()
