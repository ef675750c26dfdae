"""Verdicts on the length of pretraining follow planted slopes, and each model is pretrained once for all its tasks."""

import math

import pandas as pd
import pytest

from spectralbasis.study.experiments import length
from spectralbasis.study.runs import Results
from spectralbasis.study.subjects import TINY
from tests.study.experiments.planted import results, trajectory, verdicts

SETTINGS = length.PRESETS["cpu"]
OVERLAP, BEYOND = length.CLAIMS.values()


def steps_of(run):
    """Of the pretraining that a finetuning starts from."""
    return run.needs["model"].settings.get("steps", 0)


def planted(overlap=0.0, held=0.0, spread=0.0, farther=0.1, idle=()):
    """Slopes of overlap and effect per unit of length where runs have moved by 0.4; those of seeds differ by `spread`.

    Longer pretraining moves farther in as many steps. Runs of tasks in `idle` score like a constant answer.
    """

    def measurements(run):
        units = math.log2(1 + steps_of(run) / 100)
        off = 1 + spread * (run.seed - 2.5)
        rotation, effect = 0.1 - overlap * off * units, -0.3 + held * off * units
        tables = []
        for step in (1, 2, 4):
            far = 0.1 * step * (1 + farther * units)
            turned = rotation * (far / 0.4) ** 2
            found = {
                "subspace_overlap": (1 - turned, 1 - turned * 2**effect),
                "update_norm_relative": (far, math.nan),
                "wedin_bound": (1.0, math.nan),
            }
            tables.append(trajectory(found, (step,)))
        return pd.concat(tables, ignore_index=True)

    def result(run):
        return {"score": 0.5 if run.settings["task"] in idle else 0.8, "metric": "accuracy", "constant_score": 0.5}

    return results(length.plan(SETTINGS, Results({})), result, measurements)


def effects(findings):
    return {claim.name: claim.effect for claim in findings.claims}


@pytest.mark.parametrize(
    ("slope", "verdict", "answer"),
    [
        (0.001, "supported", "does not change the overlap"),
        (0.004, "contradicted", "overlap more after"),
        (-0.004, "contradicted", "overlap less after"),
    ],
)
def test_the_verdict_on_the_overlap_follows_its_slope(slope, verdict, answer):
    findings = length.analyse(SETTINGS, planted(overlap=slope, spread=0.02))
    assert verdicts(findings) == {OVERLAP: verdict, BEYOND: "supported"}
    assert effects(findings)[OVERLAP] == pytest.approx(slope, rel=0.01)
    assert answer in findings.answer


@pytest.mark.parametrize(
    ("slope", "verdict", "answer"),
    [
        (0.02, "supported", "any change is below the margin"),
        (0.1, "contradicted", "more stable"),
        (-0.1, "contradicted", "less stable"),
    ],
)
def test_the_verdict_on_the_effect_follows_its_slope(slope, verdict, answer):
    findings = length.analyse(SETTINGS, planted(held=slope, spread=0.02))
    assert verdicts(findings) == {OVERLAP: "supported", BEYOND: verdict}
    assert effects(findings)[BEYOND] == pytest.approx(slope, rel=0.01)
    assert answer in findings.answer


def test_seeds_that_differ_leave_it_undecided():
    findings = length.analyse(SETTINGS, planted(overlap=0.002, held=0.05, spread=0.2))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert {claim.units for claim in findings.claims} == {"12 models: 2 architectures × 6 pretraining seeds"}


def test_moving_farther_is_no_slope():
    """Rotations follow the distance alone; at equal steps those of long pretraining would be much larger."""
    findings = length.analyse(SETTINGS, planted(farther=0.5))
    assert effects(findings) == pytest.approx({OVERLAP: 0, BEYOND: 0}, abs=1e-9)
    assert findings.tables["Finetuning, at equal ‖ΔW‖"]["norm"].to_numpy() == pytest.approx(0.4)


def test_tasks_that_were_not_learned_do_not_count():
    findings = length.analyse(SETTINGS, planted(idle={"SST-2", "CIFAR-10"}))
    assert {claim.runs for claim in findings.claims} == {6 * 4 * 4}
    assert set(findings.tables["Slopes"]["task"]) == {"MNIST", "USPS", "Shakespeare", "WikiText-2"}
    assert "not learned: BERT (novels) on SST-2, ViT (Fashion-MNIST) on CIFAR-10." in findings.note
    tasks = {task for lineage in SETTINGS.lineages for task in lineage.moves}
    nothing = length.analyse(SETTINGS, planted(idle=tasks))
    assert set(verdicts(nothing).values()) == {"undecided"}
    assert not nothing.answer


def test_part_of_the_runs_and_none():
    assert set(verdicts(length.analyse(SETTINGS, Results({}))).values()) == {"undecided"}
    runs, known = length.plan(SETTINGS, Results({})), planted()
    for some in (1, 12):  # one run has no slope, and the runs of one model no interval
        findings = length.analyse(SETTINGS, Results({run.key: known.get(run) for run in runs[:some]}))
        assert set(verdicts(findings).values()) == {"undecided"}
        assert f"{some} of 144" in findings.note


def test_each_task_alone_has_its_slopes():
    table = length.analyse(SETTINGS, planted(overlap=0.004)).tables["Slopes"]
    assert len(table) == 6 * 2 * 2
    assert table.loc[table["quantity"] == "overlap", "slope"].to_numpy() == pytest.approx(0.004)
    assert (table["seeds"] == 6).all()


def test_each_length_is_pretrained_once_on_the_same_examples_for_all_tasks():
    runs = length.plan(SETTINGS, Results({}))
    models = {run.needs["model"] for run in runs}
    assert len(set(runs)) == len(runs) == 2 * 6 * 4 * 3
    assert len(models) == 2 * 6 * 4
    for lineage in SETTINGS.lineages:
        for seed in SETTINGS.seeds:
            first, *rest = (SETTINGS.pretrained(lineage, steps, seed) for steps in SETTINGS.lengths)
            assert {one.needs["model"] for one in rest} == {first} == {lineage.untrained(seed)}
            assert [one.settings["steps"] for one in rest] == [400, 1600, 6400]
            seen = rest[0].settings["steps"] * rest[0].settings["batch_size"]
            assert {one.settings["train_examples"] for one in rest} == {seen}
            assert all(sum(run.needs["model"] == one for run in runs) == 3 for one in (first, *rest))
    assert all(run.settings["measure"]["nulls"] == ["energy"] for run in runs)


def test_the_quick_preset_shares_its_pretraining_with_scale():
    quick = length.PRESETS["quick"]
    assert quick.pretrained(quick.lineages[0], 40, 1) == TINY.pretrained(TINY.sizes[-1], 1)


def test_scores_of_pretraining_are_means_over_seeds():
    runs = [SETTINGS.pretrained(SETTINGS.lineages[0], 400, seed) for seed in range(2)]
    known = results(runs, lambda run: {"score": 0.8 + 0.1 * run.seed, "metric": "accuracy"})
    table = length.analyse(SETTINGS, known).tables["Pretraining"]
    assert table[["task", "steps", "seeds"]].values.tolist() == [["Fashion-MNIST", 400, 2]]
    assert table["score"].item() == pytest.approx(0.85)
