"""Verdicts on stability follow what was planted, also from a part of the runs."""

import math

import pytest

from spectralbasis.study.experiments import stability
from spectralbasis.study.runs import Results
from tests.study.experiments.planted import results, trajectory, verdicts

SETTINGS = stability.PRESETS["cpu"]
NAN = math.nan


def planted(rotation, null_rotation, trailing=0.1, core=0.01, norm=lambda rate: rate):
    """Measurements with these rotations (1 − overlap); seeds differ a little."""

    def measurements(run):
        rate, jitter = run.settings["learning_rate"], 1 + 0.01 * run.seed
        found = {
            "subspace_overlap": (1 - rotation(rate) * jitter, 1 - null_rotation),
            "trailing_overlap": (1 - trailing * jitter, 1 - 0.1),
            "coverage_core": (core * jitter, 0.01),
            "coverage_diagonal": (0.001, 0.001 * jitter),
            "trailing_coverage": (0.01, 0.01),
            "update_norm_relative": (norm(rate), NAN),
            "wedin_bound": (1.0, NAN),
        }
        return trajectory(found)

    return results(stability.plan(SETTINGS, Results({})), lambda run: {"score": 0.8}, measurements)


def test_directions_that_are_held():
    known = planted(lambda rate: 0.002, 0.008, core=0.04)
    findings = stability.analyse(SETTINGS, known)
    claims = {claim.name: claim for claim in findings.claims}
    assert claims["leading above scrambled"].effect == pytest.approx(2, abs=0.05)
    assert claims["core covers the update"].effect == pytest.approx(2, abs=0.05)
    found = verdicts(findings)
    assert found["leading above scrambled"] == found["core covers the update"] == "supported"
    assert found["leading above trailing"] == found["stability beyond Wedin's bound"] == "supported"
    assert found["diagonal covers the update"] == "contradicted"
    assert all(claim.runs == len(stability.plan(SETTINGS, known)) for claim in findings.claims)


def test_directions_that_are_sought_out():
    found = verdicts(stability.analyse(SETTINGS, planted(lambda rate: 0.016, 0.008, trailing=0.05, core=0.005)))
    assert found["leading above scrambled"] == found["leading above trailing"] == "contradicted"
    assert found["core covers the update"] == "contradicted"


def test_a_slope_over_the_size_of_the_update():
    claims = stability.analyse(SETTINGS, planted(lambda rate: 1e-6 / rate, 0.01)).claims
    claim = next(claim for claim in claims if claim.name == "larger steps are held back more")
    assert claim.verdict == "supported"
    assert claim.effect == pytest.approx(math.log2(10), abs=0.05)


def test_plain_overlaps_are_told_beside_those_of_the_null():
    findings = stability.analyse(SETTINGS, planted(lambda rate: 0.016, 0.008))
    claims = {claim.name: claim for claim in findings.claims}
    plain, chance = claims[stability.PLAIN], claims[f"{stability.PLAIN}, scrambled"]
    assert (plain.verdict, plain.stated, plain.units) == ("supported", "after", "12 tasks of 4 models")
    assert plain.effect == pytest.approx(0.1 * 1.01 - 0.016 * 1.01)
    assert chance.effect == pytest.approx(0.1 - 0.008)
    assert "12 of 12 tasks" in plain.text
    assert "more than scrambled updates do" in findings.answer
    assert "+0.085 overlap" in findings.answer
    assert [claim.name for claim in findings.claims if claim.primary] == list(stability.PRIMARY)


def test_part_of_the_runs_and_none():
    runs = stability.plan(SETTINGS, Results({}))
    assert set(verdicts(stability.analyse(SETTINGS, Results({}))).values()) == {"undecided"}
    all_known = planted(lambda rate: 0.002, 0.008)
    one = Results({runs[0].key: all_known.get(runs[0])})
    findings = stability.analyse(SETTINGS, one)
    assert set(verdicts(findings).values()) == {"undecided"}
    assert {claim.runs for claim in findings.claims} == {1}
    assert "1 finished" in findings.note


def test_tables_and_figures():
    findings = stability.analyse(SETTINGS, planted(lambda rate: 0.002, 0.008))
    tables = findings.tables
    arms = sum(len(subject.tasks) * len(subject.learning_rates) for subject in SETTINGS.subjects)
    assert len(tables["Models, tasks and learning rates"]) == arms
    assert set(tables["Layers"]["layer"]) == {0, 1}
    assert set(tables["Kinds of matrices"]["kind"]) == {"query", "key"}
    assert (tables["Models, tasks and learning rates"]["runs"] == len(SETTINGS.seeds)).all()
    assert len(findings.figures) == 2


def test_presets_ask_for_what_they_promise():
    runs = stability.plan(SETTINGS, Results({}))
    assert len(set(runs)) == len(runs)
    assert len({run.seed for run in runs}) == 3
    assert all(run.settings["measure"]["steps"][-1] == run.settings["steps"] for run in runs)
    assert all(run.settings["train_examples"] <= 4000 for run in runs)
    for preset in stability.PRESETS.values():
        assert stability.plan(preset, Results({}))
