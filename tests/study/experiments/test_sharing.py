"""Verdicts on sharing follow what was planted; the list of unrelated tasks is what it says."""

import math

import pandas as pd
import pytest

from spectralbasis.study.experiments import task_sharing
from spectralbasis.study.runs import Results
from tests.study.experiments.planted import results, verdicts

SETTINGS = task_sharing.PRESETS["cpu"]


def planted(same, related, apart, null=0.02, base=0.01, base_null=0.01, update=0.1):
    """Comparisons whose pairs have these distances (1 − overlap), by how their tasks are related."""

    def pairs(run):
        tasks = run.settings["tasks"]
        rows = [
            {"a": i, "b": j, "task_a": tasks[i], "task_b": tasks[j]}
            for i in range(len(tasks))
            for j in range(i + 1, len(tasks))
        ]
        table = pd.DataFrame(rows)
        distance = [
            same if a == b else apart if task_sharing.unrelated(a, b) else related
            for a, b in zip(table["task_a"], table["task_b"], strict=True)
        ]
        jitter = 1 + 0.01 * (table["a"] % 3)
        return table.assign(
            value=1 - jitter * distance, null_mean=1 - null, base_overlap_a=1 - base, base_overlap_b=1 - base,
            base_null_a=1 - base_null, base_null_b=1 - base_null,
            update_cosine=0.0, update_overlap=update, update_overlap_haar=0.1,
        )  # fmt: skip

    result = {"sharing": {"permutation": {"p_value": 1e-3}}}
    return results(task_sharing.plan(SETTINGS, Results({})), lambda run: result, pairs)


def test_tasks_that_share():
    found = task_sharing.analyse(SETTINGS, planted(same=0.001, related=0.004, apart=0.005))
    claims = {claim.name: claim for claim in found.claims}
    assert claims["MiniLM: unrelated tasks share"].verdict == "supported"
    assert claims["MiniLM: unrelated tasks share"].effect == pytest.approx(2, abs=0.05)
    assert claims["MiniLM: unrelated tasks turn alike"].verdict == "supported"
    assert claims["MiniLM: seeds share more than tasks"].verdict == "supported"
    # Two-sided, and one of three alike by Holm's method.
    assert claims["MiniLM: seeds share more than tasks"].p_value == pytest.approx(3 * 2e-3)


def test_sharing_that_stability_explains_is_no_common_turn():
    """Each stays at half the null's distance from the base, and so do the pairs, give or take."""
    claims = {
        claim.name: claim
        for claim in task_sharing.analyse(
            SETTINGS, planted(0.01, 0.01, 0.01, null=0.02, base=0.005, base_null=0.01)
        ).claims
    }
    assert claims["MiniLM: unrelated tasks share"].effect == pytest.approx(1, abs=0.05)
    assert claims["MiniLM: unrelated tasks turn alike"].effect == pytest.approx(0, abs=0.05)


def test_no_interval_exists_where_all_pairs_have_a_task_in_common():
    claims = {c.name: c for c in task_sharing.analyse(SETTINGS, planted(0.001, 0.004, 0.005)).claims}
    for model in ("ViT (Fashion-MNIST)", "BERT (novels)"):
        claim = claims[f"{model}: unrelated tasks share"]
        assert (claim.verdict, claim.effect > 1, math.isnan(claim.low)) == ("undecided", True, True)
        assert claim.units.startswith("2 pairs of 3 tasks, and no interval exists")
    assert claims["MiniLM: unrelated tasks share"].units == "7 pairs of 5 tasks"


@pytest.mark.parametrize(("update", "verdict"), [(0.4, "supported"), (0.1, "undecided"), (0.05, "contradicted")])
def test_updates_that_overlap(update, verdict):
    findings = task_sharing.analyse(SETTINGS, planted(0.01, 0.01, 0.01, update=update))
    claim = next(claim for claim in findings.claims if claim.name == task_sharing.UPDATES)
    assert (claim.verdict, claim.stated) == (verdict, "after")
    assert claim.effect == pytest.approx(math.log2(update / 0.1), abs=1e-9)
    assert claim.units == "3 models, 11 pairs of tasks"
    assert f"{update / 0.1:.1f} to {update / 0.1:.1f} times; more in {11 * (update > 0.1)} of 11 pairs" in claim.text
    assert claim.primary


def test_tasks_that_part():
    found = verdicts(task_sharing.analyse(SETTINGS, planted(same=0.05, related=0.05, apart=0.05)))
    assert found["MiniLM: unrelated tasks share"] == found["MiniLM: unrelated tasks turn alike"] == "contradicted"


def test_nothing_finished():
    findings = task_sharing.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert all(math.isnan(claim.effect) for claim in findings.claims)
    assert len(findings.tables["Unrelated tasks"]) == 10 + 3 + 3


def test_what_is_unrelated():
    assert task_sharing.unrelated("CoLA", "SST-2")
    assert not task_sharing.unrelated("RTE", "MRPC")
    assert not task_sharing.unrelated("MNIST", "USPS")
    assert all(
        task_sharing.unrelated(a, b) == task_sharing.unrelated(b, a) and not task_sharing.unrelated(a, a)
        for a in task_sharing.TASKS
        for b in task_sharing.TASKS
    )


def test_models_are_those_of_stability():
    finetuned = set(task_sharing.stability.plan(SETTINGS.finetuning, Results({})))
    for run in task_sharing.plan(SETTINGS, Results({})):
        tuned = [need for role, need in run.needs.items() if role.startswith("tuned_")]
        assert len(tuned) == len(run.settings["tasks"])
        assert set(tuned) <= finetuned
        assert [need.settings["task"] for need in tuned] == run.settings["tasks"]
