"""Null draws keep what they promise, lose what they promise, and come from the seed alone."""

import pytest
import torch

from spectralbasis import compare
from spectralbasis.comparison.nulls import NULLS, draw_generator, gaussian, scrambled
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
    first = NULLS[null](update, draw_generator(3, "W", 1))
    torch.manual_seed(99)
    torch.testing.assert_close(first, NULLS[null](update, draw_generator(3, "W", 1)), rtol=0, atol=0)
    for other in (draw_generator(4, "W", 1), draw_generator(3, "V", 1), draw_generator(3, "W", 2)):
        assert not torch.equal(first, NULLS[null](update, other))


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
