"""Verdicts on reuse follow what was planted, after correction for all claims."""

import pandas as pd
import pytest

from spectralbasis.study.experiments import reuse
from spectralbasis.study.runs import Results, with_needs
from tests.study.experiments.planted import results, verdicts

SETTINGS = reuse.PRESETS["cpu"]


def planted(second, forgotten):
    """The second task's score and what is forgotten of the first, by the part that is penalised."""

    def part_of(run):
        return run.settings.get("penalty", {}).get("part", "")

    def jitter(run):
        """Something that differs from run to run."""
        return int(run.key[:2], 16) / 255

    def result(run):
        if run.action == "retention":
            return {
                "before": 0.9,
                "after": 0.9 - forgotten[part_of(run.needs["model"])] - 0.001 * run.needs["model"].seed,
            }
        if run.settings.get("method") == "spectral":
            value = second[part_of(run.needs["model"])] + 0.001 * run.seed + 0.01 * jitter(run)
            return {"score": value, "selection_score": value}
        return {"score": 0.9, "selection_score": 0.9}

    def measurements(run):
        if "measure" not in run.settings:
            return pd.DataFrame()
        return pd.DataFrame({"metric": ["update_norm_relative", "coverage_core"], "value": [0.1, 0.03]})

    return results(with_needs(reuse.plan(SETTINGS, Results({}))), result, measurements)


LOST = {"": 0.2, "core": 0.2, "outside": 0.1, "whole": 0.25}


def test_planted_verdicts():
    findings = reuse.analyse(SETTINGS, planted({"": 0.5, "core": 0.4, "outside": 0.6, "whole": 0.5}, LOST))
    assert verdicts(findings) == {
        "holds the core, against free: second task": "contradicted",
        "keeps to the core, against free: second task": "supported",
        "stays near the base, against free: second task": "undecided",
        "holds the core, against free: forgotten": "undecided",
        "keeps to the core, against free: forgotten": "supported",
        "stays near the base, against free: forgotten": "contradicted",
        "holds the core, against stays near the base: second task": "contradicted",
        "keeps to the core, against stays near the base: second task": "supported",
    }
    claims = {claim.name: claim for claim in findings.claims}
    assert claims["keeps to the core, against free: second task"].effect == pytest.approx(0.1, abs=0.01)
    assert claims["keeps to the core, against free: forgotten"].effect == pytest.approx(0.1)
    ways = findings.tables["Ways of the first finetuning"].set_index("way")
    assert ways.loc["free", "runs"] == 3 * 6
    assert ways.loc["holds the core", reuse.SECOND] == pytest.approx(0.406, abs=0.005)


def test_nothing_finished():
    findings = reuse.analyse(SETTINGS, Results({}))
    assert set(verdicts(findings).values()) == {"undecided"}
    assert findings.tables["Pairs of tasks"].empty


def test_the_free_way_has_no_penalty_and_the_others_differ_in_it_alone():
    tuned = {run for run in reuse.plan(SETTINGS, Results({})) if run.settings.get("method") == "full"}
    assert len(tuned) == 3 * 4 * 3
    without = {str({key: value for key, value in run.settings.items() if key != "penalty"}) for run in tuned}
    assert len(without) == 3
