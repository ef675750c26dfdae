"""Null draws keep what they promise, lose what they promise, and come from the seed alone."""

import json
import pickle

import pytest
import torch

from spectralbasis import InputError, compare
from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.nulls import HAAR, NULLS, Null, draw_generator, gaussian, scrambled
from tests.comparison.pairs import layered, random_updates
from tests.matrices import power_law, with_spectrum


@pytest.fixture
def update():
    return with_spectrum(40, 30, power_law(30))[0].float()


def test_scrambling_keeps_singular_values_and_loses_alignment(update):
    chance = scrambled(update, draw_generator(0, "a"))
    torch.testing.assert_close(torch.linalg.svdvals(chance), torch.linalg.svdvals(update), rtol=1e-4, atol=1e-5)
    assert sorted(chance.abs().flatten().tolist()) == sorted(update.abs().flatten().tolist())
    assert abs(float((chance * update).sum() / update.square().sum())) < 0.2


def test_gaussian_keeps_the_norm(update):
    chance = gaussian(update, draw_generator(0, "a"))
    assert float(chance.norm()) == pytest.approx(float(update.norm()), rel=1e-5)


@pytest.mark.parametrize("null", NULLS)
def test_a_draw_is_fixed_by_its_seed_and_name_alone(update, null):
    first = NULLS[null].draw(update, draw_generator(3, "W", 1))
    torch.manual_seed(99)
    torch.testing.assert_close(first, NULLS[null].draw(update, draw_generator(3, "W", 1)), rtol=0, atol=0)
    for other in (draw_generator(4, "W", 1), draw_generator(3, "V", 1), draw_generator(3, "W", 2)):
        assert not torch.equal(first, NULLS[null].draw(update, other))


def test_the_coverage_of_scrambled_updates_is_that_of_haar_directions():
    base, tuned = random_updates(12, 0.3)
    table = compare(base, [tuned], leading=8, draws=8).table
    means = table[(table.k == 8) & (table.metric.str.startswith("coverage"))].groupby("metric").null_mean.mean()
    m, n, k = 48, 40, 8
    expected = {"diagonal": k / (m * n), "core": k * k / (m * n), "left": k / m, "right": k / n}
    for name, share in expected.items():
        assert means[f"coverage_{name}"] == pytest.approx(share, rel=0.2), name


def test_rows_do_not_depend_on_which_other_matrices_are_measured():
    base, tuned = random_updates(4, 0.3)
    whole = compare(base, [tuned], leading=4).table
    part = compare(base, [tuned], leading=4, include=["*.layer.1.*"]).table
    both = whole[whole.matrix.isin(part.matrix)].reset_index(drop=True)
    assert len(part) > 0
    # q-values are adjusted over the matrices that were measured, and only they.
    assert both.drop(columns="q_value").equals(part.drop(columns="q_value"))


def test_the_null_of_two_checkpoints_is_drawn_apart():
    W0 = with_spectrum(40, 30, power_law(30))[0].float()
    one, two = (W0 + 0.1 * torch.randn(40, 30) for _ in range(2))
    table = compare(layered({"0.dense": W0}), [layered({"0.dense": one}), layered({"0.dense": two})], leading=4).table
    assert table.groupby("tuned").null_mean.mean().nunique() == 2


def shuffle_rows(update, generator):
    return update[torch.randperm(update.shape[0], generator=generator)]


SHUFFLED = Null(
    "shuffled", "a step with its rows in another order", "W0 + P ΔW with a random permutation P", shuffle_rows
)


def test_a_null_is_one_record_which_works_to_the_end(tmp_path, monkeypatch):
    base, tuned = random_updates(3, 0.3)
    passed = compare(base, [tuned], leading=4, null=SHUFFLED, draws=2, output=tmp_path / "passed")
    assert set(passed.table["null"]) == {"", "shuffled"}
    assert passed.table.loc[passed.table["metric"] == "subspace_overlap", "null_mean"].between(0, 1).all()
    summary = json.loads((tmp_path / "passed" / "summary.json").read_text())
    assert summary["null"] == "shuffled"
    assert "2 draws of the shuffled null (W0 + P ΔW with a random permutation P)" in summary["methods"]
    assert "shuffled null" in (tmp_path / "passed" / "index.html").read_text()
    monkeypatch.setitem(NULLS, "shuffled", SHUFFLED)
    registered = compare(base, [tuned], leading=4, null="shuffled", draws=2, output=tmp_path / "registered")
    assert registered.table.equals(passed.table)
    page = (tmp_path / "registered" / "index.html").read_text()
    assert "replaces W₁ by W0 + P ΔW with a random permutation P" in page
    assert "A step with its rows in another order leaves" in page


def test_a_null_travels_to_other_processes():
    settings = Settings(null=SHUFFLED)
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("null", ["shuffled", HAAR])
def test_what_cannot_be_drawn_is_refused_before_anything_is_measured(null):
    with pytest.raises(InputError, match="pass one of scrambled, gaussian, a Null, or None for no draws"):
        compare({}, [{}], null=null)
