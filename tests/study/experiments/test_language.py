"""The verdicts on language follow what was planted, on scores by which no learning rate was chosen."""

import math

import pytest

from spectralbasis.study.experiments import language
from spectralbasis.study.runs import Results, Run
from tests.study.experiments.planted import conducted, verdicts

SETTINGS = language.PRESETS["cpu"]
NUMBERS = {"full": 260_032, "lora r=1": 5_780, "lora r=8": 46_240, "band of all": 5_690, "core k=12": 5_040,
           "diagonal of all": 1_920, "band of 28": 2_870}  # fmt: skip
NAMES = {tuple(sorted((key, value) for key, value in arm.settings.items())): arm.name for arm in SETTINGS.arms}
CLAIMS = ("band of all against lora r=1", "band of all against full")


def of(run: Run) -> str:
    """The arm of a run, or `untuned`."""
    options = {name: run.settings[name] for name in run.settings if name not in (
        "task", "model", "learning_rate", *language.STORIES.settings)}  # fmt: skip
    return "untuned" if run.settings["steps"] == 1 else NAMES[tuple(sorted(options.items()))]


def planted(scores: dict[str, float], selection: dict[str, float]) -> Results:
    """Log-likelihoods of arms on the held-out passages and on those for selection; the middle rate is the best."""
    middle = {arm.name: arm.learning_rates[1] for arm in SETTINGS.arms}

    def result(run: Run) -> dict[str, object]:
        if run.action == "initialise":
            return {"parameters": 260_032}
        arm, rate = of(run), run.settings["learning_rate"]
        task = 0.5 * (run.settings["task"] == "novels")
        worse = abs(math.log(rate / middle.get(arm, rate)))
        longer = 0.3 * (run.settings["steps"] == SETTINGS.longer)
        return {
            "score": scores.get(arm, -3.0) + task + longer + 0.001 * run.seed * (arm == "full"),
            "selection_score": selection.get(arm, -3.0) + task - worse, "seconds_per_step": 0.05, "adapter_bytes": 1000,
            "parameters_backbone": NUMBERS.get(arm, 260_032), "parameters_head": 0, "parameters_model": 260_032,
            "precision": "float32",
        }  # fmt: skip

    return conducted(lambda known: language.plan(SETTINGS, known), result)


@pytest.mark.parametrize(
    ("band", "lora", "full"),
    [
        (-3.0, "supported", "supported"),
        (-3.009, "supported", "undecided"),
        (-3.02, "contradicted", "contradicted"),
        (-2.5, "supported", "supported"),
    ],
)
def test_verdicts_follow_the_margin_and_larger_is_better(band, lora, full):
    findings = language.analyse(SETTINGS, planted({"band of all": band}, {}))
    found = verdicts(findings)
    assert [found[name] for name in CLAIMS] == [lora, full]
    assert all(claim.primary for claim in findings.claims)
    first = findings.claims[0]
    assert first.effect == pytest.approx(band + 3)
    assert (first.runs, first.units) == (2 * 2 * 3, "3 seeds, each over 2 tasks")
    assert f"against lora r=1 is {'no more' if lora == 'supported' else 'more'} than 0.01 below: " in findings.answer


def test_rates_and_the_half_are_chosen_on_passages_that_are_not_scored():
    known = planted({"band of 28": -9.0}, {"band of 28": -2.0, "diagonal of all": -2.5})
    assert SETTINGS.half(known) == "band of 28"
    rates = {arm.name: SETTINGS.contest.chosen_rate(arm, known) for arm in SETTINGS.arms}
    assert rates == {arm.name: arm.learning_rates[1] for arm in SETTINGS.arms}
    claim = language.analyse(SETTINGS, known).claims[1]
    assert claim.name == "band of 28 against lora r=1"
    assert (claim.verdict, claim.effect) == ("contradicted", pytest.approx(-6.0))


def test_tables_tell_perplexities_and_what_more_steps_give():
    tables = language.analyse(SETTINGS, planted({"untuned": -5.0, "lora r=1": -2.0}, {})).tables
    told = tables["Perplexity on held-out passages"].set_index("arm")
    assert told.loc["untuned", "Shakespeare"] == pytest.approx(math.exp(5.0))
    assert told.loc["lora r=1", "novels"] == pytest.approx(math.exp(1.5))
    assert told.loc["lora r=1", "score"] == pytest.approx(-1.75)
    assert math.isnan(told.loc["untuned", "backbone"])
    steps = tables["More steps"].set_index(["arm", "steps"])["Shakespeare"]
    assert steps["lora r=1", 600] - steps["lora r=1", 300] == pytest.approx(0.3)
    by_text = tables["Differences by text"]
    assert list(by_text["task"]) == ["Shakespeare", "novels"] * 3
    assert set(by_text["pairs"]) == {3}


def test_nothing_finished_is_undecided():
    findings = language.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert findings.answer == ""
