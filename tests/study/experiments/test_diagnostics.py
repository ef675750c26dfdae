"""Whether the stories agree follows what was planted layer by layer."""

from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest

from spectralbasis.study.experiments import diagnostics
from spectralbasis.study.runs import Results, with_needs
from spectralbasis.study.trajectories import COLUMNS
from tests.study.experiments.planted import results, verdicts

SETTINGS = diagnostics.PRESETS["cpu"]
LAYERS = range(6)


def by_depth(task, layer):
    return layer


def by_task(task, layer):
    """Every task turns other layers."""
    return int(np.random.default_rng(sum(map(ord, task))).permutation(len(LAYERS))[layer])


def trajectory(task, turned):
    rows = [
        (step, f"{layer}.dense", layer, "dense", metric, "both", value, 0.5, 0.0, "scrambled")
        for step in (1, 2)
        for layer in LAYERS
        for metric, value in {
            "subspace_overlap": 1 - 0.01 * (turned(task, layer) + 1), "coverage_core": 0.1, "coverage_diagonal": 0.1,
            "update_norm_relative": 0.1, "wedin_bound": 1.0,
        }.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def planted(direction, turned=by_depth, scores=MappingProxyType({})):
    """Stories that follow what is turned, or go against it."""

    def measurements(run):
        task = run.settings.get("task", "")
        values = {
            "diagnose": lambda rank: {
                "cka": 0.9 - direction * 0.05 * rank, "svcca": 0.9 - 0.03 * (rank * 5 % 6),
                "probe_before": 0.5, "probe_after": 0.5 + direction * 0.01 * rank,
            },
            "power_laws": lambda rank: {"power_law_before": 3.0, "power_law_after": 3.0 + 0.1 * rank},
        }.get(run.action)  # fmt: skip
        if values is None:
            return trajectory(task, turned)
        return pd.DataFrame(
            {"layer": layer, "matrix": f"{layer}.dense", "metric": metric, "value": value}
            for layer in LAYERS
            for metric, value in values(turned(task, layer)).items()
        )

    runs = with_needs(diagnostics.plan(SETTINGS, Results({})))
    return results(runs, lambda run: {"score": scores.get(run.settings.get("task"), 0.9)}, measurements)


@pytest.fixture
def package(monkeypatch):
    """Says whether `weightwatcher` is installed."""
    return lambda installed: monkeypatch.setattr(diagnostics, "is_available", lambda: installed)


@pytest.mark.parametrize(("direction", "expected"), [(1, "supported"), (-1, "contradicted")])
def test_stories(direction, expected, package):
    package(True)
    findings = diagnostics.analyse(SETTINGS, planted(direction))
    found = verdicts(findings)
    assert found["activation change (CKA) follows rotation"] == expected
    assert found["probe gain follows rotation"] == expected
    assert found["power-law shift follows rotation"] == "supported"
    claims = {claim.name: claim.effect for claim in findings.claims}
    assert claims["activation change (CKA) follows rotation"] == pytest.approx(direction)
    assert abs(claims["activation change (SVCCA) follows rotation"]) < 0.99
    assert len(findings.tables["Layers"]) == 3 * len(LAYERS)
    # Every task turns the same layers: the stories may follow the layers alone.
    assert claims["probe gain follows the task's own rotation"] == 0
    assert found["probe gain follows the task's own rotation"] == "undecided"


def test_what_ranks_by_depth_tells_nothing_at_equal_depth(package):
    package(True)
    claims = {claim.name: claim for claim in diagnostics.analyse(SETTINGS, planted(1)).claims}
    assert claims["probe gain follows rotation"].effect == pytest.approx(1)
    assert np.isnan(claims["probe gain follows rotation at equal depth"].effect)
    assert claims["probe gain follows rotation at equal depth"].units == "0 tasks"


def test_what_follows_rotation_beyond_depth_does_so_at_equal_depth(package):
    package(True)
    findings = diagnostics.analyse(SETTINGS, planted(-1, by_task))
    claims = {claim.name: claim for claim in findings.claims}
    assert claims["probe gain follows rotation at equal depth"].verdict == "contradicted"
    assert claims["probe gain follows rotation at equal depth"].primary


def test_the_partial_correlation_is_that_of_residuals():
    x, y, z = np.random.default_rng(0).normal(size=(3, 50))
    y = y + z
    residuals = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (x, y)]
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, z), (y, z))]
    assert diagnostics.partial_correlation(*pairs) == pytest.approx(np.corrcoef(*residuals)[0, 1])
    assert np.isnan(diagnostics.partial_correlation(0.5, 0.5, -1.0))


def test_models_that_learned_nothing_carry_no_weight(package):
    package(True)
    findings = diagnostics.analyse(SETTINGS, planted(1, scores={"SST-2": 0.52}))
    claims = {claim.name: claim for claim in findings.claims}
    assert claims["activation change (CKA) follows rotation"].units == "9 tasks of 3 models"
    assert "MiniLM on SST-2, BERT (novels) on SST-2 learned nothing" in findings.note


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "expected"), [(1, "supported"), (-1, "contradicted")])
def test_stories_of_the_task_alone(direction, expected, package):
    package(True)
    findings = diagnostics.analyse(SETTINGS, planted(direction, by_task))
    assert verdicts(findings)["probe gain follows the task's own rotation"] == expected
    own = findings.tables["Rank correlations over layers"].set_index("task")["probe gain"]
    beyond = findings.tables["More than with other tasks' rotation"].set_index("task")["probe gain"]
    ranks = {task: [by_task(task, layer) for layer in LAYERS] for task in ("RTE", "MRPC", "CoLA", "STS-B", "SST-2")}
    others = [np.corrcoef(ranks["RTE"], ranks[task])[0, 1] for task in ranks if task != "RTE"]
    assert own["RTE"] == pytest.approx(direction)
    assert beyond["RTE"] == pytest.approx(direction * (1 - np.mean(others)))


@pytest.mark.slow
def test_without_the_package_the_other_stories_are_told(package):
    package(False)
    known = planted(1)
    assert {run.action for run in diagnostics.plan(SETTINGS, Results({}))} == {"diagnose"}
    findings = diagnostics.analyse(SETTINGS, known)
    assert verdicts(findings)["activation change (CKA) follows rotation"] == "supported"
    assert verdicts(findings)["power-law shift follows rotation"] == "undecided"
    assert "spectralbasis[diagnostics]" in findings.note


def test_known_power_laws_need_no_package(package):
    package(True)
    known = planted(1)
    package(False)
    assert {run.action for run in diagnostics.plan(SETTINGS, known)} == {"diagnose", "power_laws"}
    assert verdicts(diagnostics.analyse(SETTINGS, known))["power-law shift follows rotation"] == "supported"


def test_nothing_finished():
    assert set(verdicts(diagnostics.analyse(SETTINGS, Results({}))).values()) == {"undecided"}
