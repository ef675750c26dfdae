"""`compare --fail-if`: what a condition may say, when it holds, and with which exit code the command ends."""

import math

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import spectralbasis as sb
from spectralbasis.cli import app
from spectralbasis.comparison.gate import METRICS, check_askable, held, parse_condition
from tests.comparison.pairs import random_updates


@pytest.fixture(scope="module")
def comparison():
    base, tuned = random_updates(4, 0.3)
    return sb.compare(base, [tuned], leading=8, draws=3, trailing=True)


def reasons(comparison, *texts, **changes):
    return held([parse_condition(text) for text in texts], comparison.table, {**comparison.summary(), **changes})


def test_every_metric_of_the_table_can_be_named(comparison):
    assert set(comparison.table["metric"]) == set(METRICS)
    assert not reasons(comparison, *(f"{name}>1e9" for name in METRICS))


def test_the_value_is_the_mean_over_matrices_of_all_leading_directions(comparison):
    rows = comparison.table.query("metric == 'subspace_overlap' and k == 8")
    by_matrix = rows.groupby("matrix")["value"].mean()
    mean = by_matrix.mean()
    assert reasons(comparison, f"overlap<{mean + 1e-9}")
    assert not reasons(comparison, f"overlap<{mean - 1e-9}")
    (said,) = reasons(comparison, f"min:overlap<={by_matrix.min() + 1e-9}")
    assert by_matrix.idxmin() in said
    assert f"{by_matrix.min():.6g}" in said
    assert reasons(comparison, f"max:subspace_overlap>={by_matrix.max() - 1e-9}")
    assert not reasons(comparison, f"max:subspace_overlap>{by_matrix.max() + 1e-9}")


def test_facts_of_the_summary(comparison):
    verdict = comparison.summary()["stability"]["verdict"]
    assert reasons(comparison, f"verdict={verdict}")
    others = {"supported", "contradicted", "undecided"} - {
        comparison.summary()[name]["verdict"]
        for name in ("stability", "coverage", "trailing_stability", "trailing_coverage")
    }
    assert not reasons(comparison, *(f"verdict={one}" for one in others))
    assert not reasons(comparison, "unpaired>0", "failed>0")
    assert reasons(comparison, "unpaired>0", unpaired=[{"matrices": 2}]) == ["unpaired>0 holds: unpaired is 2"]


def test_what_the_null_keeps_has_no_verdict_to_ask_for():
    base, tuned = random_updates(4, 0.3)
    found = sb.compare(base, [tuned], leading=4, null="energy", draws=2)
    verdict = found.summary()["stability"]["verdict"]
    assert reasons(found, f"verdict={verdict}") == [
        f"verdict={verdict} holds: the verdict on stability is {verdict}"
    ]  # not of coverage, which is undecided whatever was measured


def test_what_has_no_value_counts_as_held(comparison):
    table = comparison.table.copy()
    table.loc[table["metric"].eq("update_norm").idxmax(), "value"] = math.nan
    (said,) = held([parse_condition("update_norm>1e9")], table, comparison.summary())
    assert "no value" in said
    without = table[table["metric"] != "intruders"]
    assert held([parse_condition("intruders>10")], without, comparison.summary())


def test_a_pair_that_could_not_be_measured_fails_every_condition_on_a_metric():
    base, tuned = random_updates(4, 0.3)
    tuned[next(iter(tuned))] = torch.full_like(tuned[next(iter(tuned))], math.nan)
    found = sb.compare(base, [tuned], leading=4, null=None)
    assert "could not be measured" in reasons(found, "overlap<0")[0]
    assert reasons(found, "failed>0") == ["failed>0 holds: failed is 1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlop<0.9", "unknown name overlop; names are matched_cosine"),
        ("overlap", "no condition"),
        ("overlap<", "no condition"),
        ("overlap<nan", "expected a number"),
        ("overlap<high", "expected a number"),
        ("overlap=<0.9", "no condition"),
        ("verdict=good", "verdict= and supported or contradicted or undecided"),
        ("verdict>supported", "verdict= and"),
        ("min:unpaired>0", "write unpaired>0"),
        ("median:overlap<1", "no condition"),
    ],
)
def test_what_is_no_condition(text, message):
    with pytest.raises(sb.InputError, match=message):
        parse_condition(text)


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(sb.InputError, match="--trailing"):
        check_askable([parse_condition("trailing_overlap<1")], trailing=False, null=True)
    with pytest.raises(sb.InputError, match="needs a null"):
        check_askable([parse_condition("verdict=contradicted")], trailing=False, null=False)


def test_exit_codes(tmp_path):
    base, tuned = random_updates(2, 0.3)
    files = []
    for name, state in {"base": base, "tuned": tuned}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        files.append(str(tmp_path / f"{name}.safetensors"))
    command = ["compare", *files, "--leading", "4", "--null", "none"]

    def run(*conditions):
        extra = [text for one in conditions for text in ("--fail-if", one)]
        return CliRunner().invoke(app, [*command, *extra])

    assert run("overlap<0", "unpaired>0").exit_code == 0
    found = run("unpaired>0", "overlap<1")
    assert found.exit_code == 3
    assert "failed: overlap<1 holds: the mean subspace_overlap over 2 matrices is 0." in found.stderr
    assert "stability" in found.stdout
    missing = CliRunner().invoke(app, ["compare", "nowhere", "nothing", "--fail-if", "overlop<1"])
    assert missing.exit_code == 2  # before anything is opened
    assert "overlop" in missing.stderr
