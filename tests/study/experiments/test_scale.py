"""Verdicts on scale follow what was planted, also from a part of the runs."""

import math

import pandas as pd
import pytest

from spectralbasis.study.experiments import scale
from spectralbasis.study.runs import Results
from tests.study.experiments.planted import results, trajectory, verdicts

SETTINGS = scale.PRESETS["cpu"]
NAN = math.nan
STEPS, NORMS = "at equal steps", "at equal ‖ΔW‖"


def examples(run):
    return run.needs["model"].settings["train_examples"]


def planted(rotation, norm, null=0.4):
    """Rotation (1 − overlap) and distance of each finetuning by its pretraining examples and by its share of steps."""

    def measurements(run):
        jitter = 1 + 0.01 * math.sin(examples(run) + 5 * run.seed)
        tables = []
        for step in (1, 2, 4):
            far = norm(examples(run)) * step * jitter
            found = {
                "subspace_overlap": (1 - rotation(examples(run), far) * jitter, 1 - null),
                "matched_cosine": (0.9, NAN),
                "coverage_core": (0.01, 0.01),
                "coverage_diagonal": (0.001, 0.001),
                "update_norm_relative": (far, NAN),
                "wedin_bound": (1.0, NAN),
            }
            tables.append(trajectory(found, (step,)))
        return pd.concat(tables, ignore_index=True)

    return results(scale.plan(SETTINGS, Results({})), lambda run: {"score": 0.8, "metric": "accuracy"}, measurements)


def by_question(findings, view, ending):
    return {claim.verdict for claim in findings.claims if claim.name == f"{ending}, {view}"}


def test_directions_that_data_make_more_stable():
    findings = scale.analyse(SETTINGS, planted(lambda n, far: 0.1 / math.log10(n), lambda n: 1.0))
    for view in (STEPS, NORMS):
        assert by_question(findings, view, "more data, more stable") == {"supported"}
        assert by_question(findings, view, "more data, more held") == {"supported"}
    assert by_question(findings, STEPS, "more data, farther") <= {"undecided", "contradicted"}
    assert {claim.runs for claim in findings.claims} == {3 * 2 * (5 + 4)}
    assert {claim.units for claim in findings.claims} == {"6 units: 2 architectures × 3 seeds"}


def test_stability_that_is_no_more_than_shorter_steps():
    """Rotation follows the distance alone, and more data make for shorter steps."""
    findings = scale.analyse(SETTINGS, planted(lambda n, far: 0.02 * far**0.5, lambda n: 1 - 0.1 * math.log10(n)))
    assert by_question(findings, STEPS, "more data, more stable") == {"supported"}
    assert by_question(findings, STEPS, "more data, farther") == {"contradicted"}
    assert "supported" not in by_question(findings, NORMS, "more data, more stable")


def test_directions_that_data_make_less_stable():
    findings = scale.analyse(SETTINGS, planted(lambda n, far: 0.02 * math.log10(n), lambda n: 1.0))
    assert by_question(findings, NORMS, "more data, more held") == {"contradicted"}


def test_the_effect_is_the_slope_per_decade():
    findings = scale.analyse(SETTINGS, planted(lambda n, far: 1 - 0.1 * math.log10(n), lambda n: 1.0))
    claim = next(claim for claim in findings.claims if claim.name == "more data, more stable, at equal steps")
    assert claim.effect == pytest.approx(0.1, rel=0.02)
    trends = findings.tables["Trends"]
    assert (trends["p, Holm"] >= trends["p"]).all()
    assert (trends.query("quantity == 'overlap'")["Jonckheere p"] < 0.05).all()
    assert trends["slope"].notna().all()


def test_moves_of_a_seed_are_one_unit():
    rows = pd.DataFrame(
        {"lineage": "m", "task": task, "seed": seed, "examples": n, "overlap": (slope + seed) * math.log10(n)}
        for task, slope in (("a", 1.0), ("b", 2.0)) for seed in (0, 1) for n in (10, 100, 1000)
    )  # fmt: skip
    found = scale.pooled_slopes(rows, "overlap")
    assert found["slope"].tolist() == pytest.approx([1.5, 2.5])


def test_part_of_the_runs_and_none():
    nothing = scale.analyse(SETTINGS, Results({}))
    assert set(verdicts(nothing).values()) == {"undecided"}
    runs = scale.plan(SETTINGS, Results({}))
    known = planted(lambda n, far: 0.1, lambda n: 1.0)
    first = Results({run.key: known.get(run) for run in runs[:5]})
    findings = scale.analyse(SETTINGS, first)
    assert set(verdicts(findings).values()) == {"undecided"}
    assert max(claim.runs for claim in findings.claims) == 5
    assert "5 of 54 finetunings" in findings.note


def test_tables_and_figures():
    findings = scale.analyse(SETTINGS, planted(lambda n, far: 0.1, lambda n: 1.0))
    assert len(findings.tables["Finetuning"]) == 2 * 5 + 2 * 4
    assert (findings.tables["Finetuning"]["seeds"] == 3).all()
    assert len(findings.figures) == 4
    pretraining = scale.plan(SETTINGS, Results({}))[0].needs["model"]
    known = results([pretraining], lambda run: {"score": 0.9, "metric": "accuracy"})
    table = scale.analyse(SETTINGS, known).tables["Pretraining"]
    assert table[["examples", "score", "seeds"]].values.tolist() == [[200, 0.9, 1]]


def test_presets_plan_each_run_once():
    for preset in scale.PRESETS.values():
        runs = scale.plan(preset, Results({}))
        assert len(set(runs)) == len(runs) > 0
