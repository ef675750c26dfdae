"""Verdicts on methods follow what was planted, also from a part of the runs."""

from dataclasses import replace

import pandas as pd
import pytest

from spectralbasis.study.experiments import glue
from spectralbasis.study.runs import Results, Run
from tests.study.experiments.planted import conducted, verdicts

SETTINGS = glue.PRESETS["cpu"]
FORGOTTEN = {"spectral": 0.1, "lora": 0.1, "full": 0.4}
COUNTS = {"spectral": 14_000, "lora": 42_000, "full": 22_000_000}
PRECISIONS = ("bf16", "bf16", "float32")


def planted(spectral: float, lora: float, spread: float = 0.0) -> Results:
    """Scores of spectral arms and of all others; tasks differ more than methods do."""

    def tuned(run: Run) -> dict[str, object]:
        if run.action == "retention":
            tuned_by = run.needs["adapter"].settings["method"]
            return {"before": -3.0, "after": -3.0 - FORGOTTEN.get(tuned_by, 0.5) - 0.001 * run.needs["adapter"].seed}
        if run.action != "tune":
            return {}
        method, task = run.settings["method"], run.settings["task"]
        ours = method in ("spectral", "svft")
        level = (spectral if ours else lora) + 0.01 * len(task)
        noise = spread * (1 if task in ("RTE", "CoLA") else -1) * ours
        return {
            "score": level + noise + 0.001 * run.seed, "selection_score": level + noise, "seconds_per_step": 0.5,
            "parameters_backbone": COUNTS.get(method, 0), "parameters_head": 770, "parameters_model": 22_000_000,
            "adapter_bytes": 1000, "precision": PRECISIONS[run.seed],
        }  # fmt: skip

    return conducted(lambda known: glue.plan(SETTINGS, known), tuned)


@pytest.mark.parametrize(
    ("spectral", "lora", "spread", "verdict"),
    [
        (0.80, 0.78, 0.001, "supported"),
        (0.80, 0.803, 0.001, "supported"),
        (0.75, 0.80, 0.001, "contradicted"),
        (0.80, 0.80, 0.1, "undecided"),
    ],
)
def test_no_worse_than_lora_with_more_numbers(spectral, lora, spread, verdict):
    known = planted(spectral, lora, spread)
    findings = glue.analyse(SETTINGS, known)
    own = {name: found for name, found in verdicts(findings).items() if not name.startswith("forgetting")}
    assert set(own.values()) == {verdict}
    claim = findings.claims[0]
    assert (claim.runs, claim.units, claim.margin) == (2 * 5 * 3, "5 tasks of 1 model", 0.01)
    assert claim.low <= claim.effect <= claim.high
    shown = findings.tables["Against full finetuning"].set_index("arm")
    assert shown.loc["lora r=1", "difference"] == pytest.approx(0)
    assert shown.loc["diagonal", "difference"] == pytest.approx(spectral - lora - spread / 5, abs=1e-9)


def test_both_halves_count_where_no_rate_was_chosen():
    scores = pd.DataFrame(
        {"task": ["SST-2", "MRPC", "RTE"], "score": [0.5, 0.6, 0.7], "selection_score": [0.9, 0.9, 0.9]}
    )
    found = glue.both_halves(scores, {"SST-2", "MRPC"})
    assert found["score"].tolist() == pytest.approx([0.5, 0.6, 0.8])


def test_tasks_at_chance_are_shown_apart():
    def tuned(run: Run) -> dict[str, object]:
        if run.action != "tune":
            return {"before": 0.0, "after": 0.0}
        score = {"RTE": 0.54, "CoLA": 0.0}.get(run.settings["task"], 0.8)
        return {**FACTS, "score": score, "selection_score": score}

    findings = glue.analyse(SETTINGS, conducted(lambda known: glue.plan(SETTINGS, known), tuned))
    assert {"RTE", "CoLA"} & {*findings.tables["Scores"].columns} == set()
    assert {"RTE", "CoLA"} < {*findings.tables["Scores on tasks at chance"].columns}
    assert "RTE and CoLA" in findings.note
    claims = {claim.name: claim for claim in findings.claims}
    assert claims["diagonal against lora r=1"].units == "5 tasks of 1 model"
    assert claims["diagonal against lora r=1, on tasks that were learned"].units == "3 tasks of 1 model"
    assert [claim.name for claim in findings.claims if claim.primary] == [
        "diagonal against lora r=1", "core k=35 against lora r=8", "core k=35 against lora r=1",
    ]  # fmt: skip


def test_costs_say_what_they_were_measured_in():
    shown = glue.analyse(SETTINGS, planted(0.8, 0.8)).tables["Numbers, time and bytes"].set_index("arm")
    assert shown.loc["lora r=1", "precision"] == "bf16, float32"
    assert shown.loc["dora", "precision"] == "bf16"
    assert shown.loc["dora", "adapter_bytes"] == 1000


def test_everything_is_planned_in_the_order_of_preference():
    alone = replace(SETTINGS, forgetting=None)
    plan = glue.plan(alone, planted(0.8, 0.8))
    methods = [run.settings["method"] for run in plan]
    assert {"full", "head", "bitfit", "lora", "psoft", "spectral", "svft"} == set(methods[: methods.index("dora")])
    assert "psoft" not in methods[methods.index("dora") :]
    assert {"adapterfusion", "houlsby", "subspace", "fourierft", "vera"} <= set(methods)
    fusion = next(run for run in plan if run.settings["method"] == "adapterfusion")
    assert {run.settings["task"] for role, run in fusion.needs.items()} == {*glue.MINILM_LONGER.tasks} - {
        fusion.settings["task"]
    }


def test_none_of_the_runs_concludes_nothing():
    findings = glue.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert findings.note.startswith("0 of 200 runs")


def test_tables_of_part_of_the_runs_leave_out_means_that_would_mislead():
    trials_only = conducted(lambda known: glue.plan(SETTINGS, known), lambda run: {"selection_score": 0.5, **FACTS}, 1)
    findings = glue.analyse(SETTINGS, trials_only)
    assert findings.tables["Scores"].set_index("arm")["mean"].drop("fourierft").isna().all()


FACTS = {
    "score": 0.5, "seconds_per_step": 1.0, "parameters_backbone": 1, "parameters_head": 1, "parameters_model": 10,
    "adapter_bytes": 1, "precision": "float32",
}  # fmt: skip


def test_forgetting_is_the_loss_of_likelihood_on_the_text_of_pretraining():
    findings = glue.analyse(SETTINGS, planted(0.8, 0.8))
    shown = findings.tables["Forgetting"].set_index("arm")
    assert shown.loc["full", "change of the log-likelihood"] == pytest.approx(-0.401)
    assert shown.loc["diagonal", "change of the log-likelihood"] == pytest.approx(-0.101)
    assert set(shown["runs"]) == {3 * 3}
    found = {name: verdict for name, verdict in verdicts(findings).items() if name.startswith("forgetting")}
    assert {name for name, verdict in found.items() if verdict == "supported"} == {
        f"forgetting, {arm} against full" for arm in ("diagonal", "core k=9", "sparse")
    }
    assert {found[f"forgetting, {arm} against lora r=1"] for arm in ("diagonal", "core k=9", "sparse")} == {"undecided"}


def test_what_is_left_is_asked_of_the_model_that_was_tuned():
    plan = glue.plan(SETTINGS, planted(0.8, 0.8))
    asked = [run for run in plan if run.action == "retention"]
    assert len(asked) == 6 * 3 * 3
    for run in asked:
        assert run.needs["adapter"].needs["model"] == run.needs["model"] == glue.SMALL_BERT.model
        assert run.settings["second_task"] == run.needs["adapter"].settings["task"]
    paper = glue.PRESETS["paper"]
    assert {run.settings["model"] for run in glue.plan(paper, Results({})) if run.action == "retention"} <= {
        "FacebookAI/roberta-base"
    }


def test_the_frontier_names_each_arm_with_its_numbers_best_first():
    findings = glue.analyse(SETTINGS, planted(0.80, 0.75))
    traces = findings.figures["Score against trained numbers"].data
    shown = findings.tables["Scores"].set_index("arm")["mean"]
    assert {trace.name: trace.y[0] for trace in traces} == pytest.approx(shown.to_dict())
    assert [trace.y[0] for trace in traces] == sorted(shown, reverse=True)
    assert {trace.name: trace.x[0] for trace in traces}["diagonal"] == COUNTS["spectral"]
    assert len({(place % 10, trace.marker.symbol) for place, trace in enumerate(traces)}) == len(traces) == len(shown)
