"""Verdicts on pretraining against scratch follow what was planted, also from a part of the runs."""

import math

import pandas as pd
import pytest

from spectralbasis.study.experiments import scale, scratch
from spectralbasis.study.runs import Results
from tests.study.experiments.planted import results, trajectory, verdicts

SETTINGS = scratch.PRESETS["cpu"]
NAN = math.nan


def labelled():
    return {one.run: one.labels for one in scratch._runs(SETTINGS)}


def planted(rotation, speed, idle=""):
    """Rotation (1 − overlap) by start and distance, and the distance of a step by start."""
    labels = labelled()

    def measurements(run):
        start, jitter = labels[run]["start"], 1 + 0.01 * run.seed
        tables = []
        for step in (1, 2, 4):
            far = speed(start) * step
            found = {
                "subspace_overlap": (1 - rotation(start, far) * jitter, 1 - 0.4),
                "matched_cosine": (0.9, NAN),
                "coverage_core": (0.01, 0.01),
                "coverage_diagonal": (0.001, 0.001),
                "update_norm_relative": (far, NAN),
                "wedin_bound": (1.0, NAN),
            }
            tables.append(trajectory(found, (step,)))
        return pd.concat(tables, ignore_index=True)

    return results(labels, lambda run: {"score": 0.5 if run.settings["task"] == idle else 0.8}, measurements)


def test_pretraining_that_makes_directions_stable():
    known = planted(lambda start, far: 0.01 if start == scratch.PRETRAINED else 0.1, lambda start: 0.1)
    findings = scratch.analyse(SETTINGS, known)
    assert set(verdicts(findings).values()) == {"supported"}
    stable = findings.claims[0]
    assert stable.effect == pytest.approx(0.09, rel=0.05)
    assert stable.runs == 2 * 3 * 6


def test_pretraining_that_only_shortens_the_steps():
    known = planted(lambda start, far: 0.1 * far, lambda start: 0.1 if start == scratch.PRETRAINED else 0.4)
    found = verdicts(scratch.analyse(SETTINGS, known))
    assert found["pretrained more stable than random weights, at equal steps"] == "supported"
    assert found["pretrained more stable than random weights, at equal ‖ΔW‖"] != "supported"


def test_learning_the_task_alone_may_do_as_much():
    def rotation(start, far):
        return {scratch.PRETRAINED: 0.02, scratch.LEARNED: 0.01}.get(start, 0.1)

    found = verdicts(scratch.analyse(SETTINGS, planted(rotation, lambda start: 0.1)))
    assert found["pretrained more held than random weights, at equal ‖ΔW‖"] == "supported"
    assert found["pretrained more held than weights learned on the task alone, at equal ‖ΔW‖"] == "contradicted"


def test_controls_that_learned_nothing_carry_no_weight():
    known = planted(lambda start, far: 0.01 if start == scratch.PRETRAINED else 0.1, lambda start: 0.1, idle="SST-2")
    findings = scratch.analyse(SETTINGS, known)
    assert {claim.units for claim in findings.claims} == {"4 tasks of 3 models"}
    assert "BERT (novels) on SST-2 from random weights" in findings.note
    assert len(findings.tables["Pretrained minus other starts"]) == 6 * 6


def test_part_of_the_runs_and_none():
    assert set(verdicts(scratch.analyse(SETTINGS, Results({}))).values()) == {"undecided"}
    known = planted(lambda start, far: 0.1, lambda start: 0.1)
    runs = scratch.plan(SETTINGS, Results({}))
    first = Results({run.key: known.get(run) for run in runs[:2]})
    findings = scratch.analyse(SETTINGS, first)
    assert set(verdicts(findings).values()) == {"undecided"}
    assert [claim.runs for claim in findings.claims] == [2, 2, 0, 2, 0, 0]
    assert "2 of 72 trainings" in findings.note


def test_the_pretrained_runs_are_those_of_scale():
    of_scale = set(scale.plan(scale.PRESETS["cpu"], Results({})))
    pretrained = [run for run, labels in labelled().items() if labels["start"] == scratch.PRETRAINED]
    assert sum(run in of_scale for run in pretrained) == 3 * 2 * 2


def test_what_was_learned_alone_goes_on_from_the_random_weights_at_the_rate_of_the_pretrained():
    labels = labelled()
    for run, one in labels.items():
        if one["start"] == scratch.LEARNED:
            before = run.needs["model"]
            assert labels[before]["start"] == scratch.FAST
            assert before.needs["model"].action == "initialise"
            assert run.settings["learning_rate"] < before.settings["learning_rate"]


def test_tables():
    findings = scratch.analyse(SETTINGS, planted(lambda start, far: 0.1, lambda start: 0.1))
    assert len(findings.tables["Starts"]) == 6 * 4
    assert len(findings.tables["Pretrained minus other starts"]) == 6 * 6
    for preset in scratch.PRESETS.values():
        assert scratch.plan(preset, Results({}))
