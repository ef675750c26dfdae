"""Whether the stories agree follows what was planted layer by layer."""

import pandas as pd
import pytest

from spectralbasis.study.experiments import diagnostics
from spectralbasis.study.measures.trajectories import COLUMNS
from spectralbasis.study.runs import Results
from spectralbasis.study.runs.run import with_needs
from tests.study.experiments.planted import results, verdicts

SETTINGS = diagnostics.PRESETS["cpu"]
LAYERS = range(6)


def trajectory(run):
    rows = [
        (step, f"{layer}.dense", layer, "dense", metric, "both", value, 0.5, 0.0)
        for step in (1, 2)
        for layer in LAYERS
        for metric, value in {
            "subspace_overlap": 1 - 0.01 * (layer + 1), "coverage_core": 0.1, "coverage_diagonal": 0.1,
            "update_norm_relative": 0.1, "wedin_bound": 1.0,
        }.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def planted(direction):
    def measurements(run):
        values = {
            "diagnose": lambda layer: {
                "cka": 0.9 - direction * 0.05 * layer, "svcca": 0.9 - 0.03 * (layer * 5 % 6),
                "probe_before": 0.5, "probe_after": 0.5 + direction * 0.01 * layer,
            },
            "power_laws": lambda layer: {"power_law_before": 3.0, "power_law_after": 3.0 + 0.1 * layer},
        }.get(run.action)  # fmt: skip
        if values is None:
            return trajectory(run)
        return pd.DataFrame(
            {"layer": layer, "matrix": f"{layer}.dense", "metric": metric, "value": value}
            for layer in LAYERS
            for metric, value in values(layer).items()
        )

    runs = with_needs(diagnostics.plan(SETTINGS, Results({})))
    return results(runs, lambda run: {"score": 0.5}, measurements)


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
