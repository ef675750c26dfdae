"""Null draws keep what they promise, lose what they promise, and come from the seed alone."""

import json
import pickle

import numpy as np
import pytest
import torch

from spectralbasis import InputError, compare
from spectralbasis.comparison.measuring import Settings
from spectralbasis.comparison.nulls import (
    COVERAGES,
    ENERGY,
    HAAR,
    NULLS,
    SCRAMBLED_LEFT,
    SCRAMBLED_RIGHT,
    Null,
    SingularVectors,
    draw_generator,
    energy_preserving,
    gaussian,
    scrambled,
    scrambled_left,
    scrambled_right,
)
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
    vectors = SingularVectors.of(with_spectrum(40, 30, power_law(30), seed=1)[0].float())

    def drawn(seed, tuned, number=0):
        return list(NULLS[null].draws(update, 2, seed, "W", tuned, lambda: vectors))[number]

    first = drawn(3, "a")
    torch.manual_seed(99)
    torch.testing.assert_close(first, drawn(3, "a"), rtol=0, atol=0)
    for other in (drawn(4, "a"), drawn(3, "b"), drawn(3, "a", 1)):
        assert not torch.equal(first, other)


def test_scrambling_one_side_keeps_what_the_update_has_on_the_other(update):
    left = scrambled_left(update, draw_generator(0, "a"))
    torch.testing.assert_close(left.T @ left, update.T @ update, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(left @ left.T, update @ update.T, atol=1e-3)
    right = scrambled_right(update, draw_generator(0, "a"))
    torch.testing.assert_close(right @ right.T, update @ update.T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(right.T @ right, update.T @ update, atol=1e-3)
    assert sorted(left.abs().flatten().tolist()) == sorted(update.abs().flatten().tolist())


SHAPES = [((40, 30), 30), ((30, 40), 30), ((30, 30), 30), ((36, 30), 20), ((9, 30), 9)]


@pytest.mark.parametrize(("shape", "rank"), SHAPES)
def test_the_energy_on_each_pair_of_directions_is_kept(shape, rank):
    m, n = shape
    generator = np.random.default_rng(0)
    W0 = generator.standard_normal((m, rank)) @ generator.standard_normal((rank, n))
    update = 0.02 * generator.standard_normal((m, 2)) @ generator.standard_normal((2, n))
    update += 0.01 * generator.standard_normal((m, n))
    vectors = SingularVectors.of(torch.from_numpy(W0))
    assert vectors.U.shape == (m, rank)
    chance = energy_preserving(torch.from_numpy(update), draw_generator(0, "a"), vectors).numpy()
    U, _, Vh = np.linalg.svd(W0)  # complete bases, by another program
    before, after = U.T @ update @ Vh.T, U.T @ chance @ Vh.T
    np.testing.assert_allclose(np.abs(after[:rank, :rank]), np.abs(before[:rank, :rank]), atol=1e-10)
    signs = np.sign(after[:rank, :rank] / before[:rank, :rank])
    assert np.linalg.matrix_rank(signs) == 1
    assert 0 < (signs > 0).mean() < 1
    # Of the null spaces the energy on each direction of the other side is kept.
    np.testing.assert_allclose((after[rank:] ** 2).sum(0)[:rank], (before[rank:] ** 2).sum(0)[:rank], atol=1e-10)
    np.testing.assert_allclose((after[:, rank:] ** 2).sum(1)[:rank], (before[:, rank:] ** 2).sum(1)[:rank], atol=1e-10)
    # Whatever signs or rotation they get, the overlaps with the base are the same.
    D1, D2 = np.append(signs[:, 0], np.ones(m - rank)), np.append(signs[0], np.ones(n - rank)) * signs[0, 0]
    other = U @ (D1[:, None] * before * D2) @ Vh
    for k in (2, 5):
        found = [overlaps(W0, W0 + moved, k) for moved in (chance, other)]
        np.testing.assert_allclose(found[0], found[1], atol=1e-10)
        assert max(found[0]) < 1 - 1e-6


def overlaps(W0, W1, k):
    """Left and right, by NumPy."""
    (U0, _, V0), (U1, _, V1) = (np.linalg.svd(W, full_matrices=False) for W in (W0, W1))
    return [((U0[:, :k].T @ U1[:, :k]) ** 2).sum() / k, ((V0[:k] @ V1[:k].T) ** 2).sum() / k]


@pytest.mark.parametrize("null", [SCRAMBLED_LEFT, SCRAMBLED_RIGHT, ENERGY])
def test_what_a_null_keeps_has_no_null(null, tmp_path):
    base, tuned = random_updates(4, 0.3)
    table = compare(base, [tuned], leading=8, null=null.name, trailing=True, output=tmp_path).table
    nulled = set(table[table["null"] == null.name]["metric"])
    assert nulled == {"subspace_overlap", "trailing_overlap", "trailing_coverage", *COVERAGES} - null.keeps
    kept = table[table["metric"].isin(null.keeps)]
    assert len(kept) > 0
    assert kept[["null_mean", "null_std", "z", "p_value"]].isna().all(axis=None)
    overlap = table[table["metric"] == "subspace_overlap"]
    assert set(overlap["null_from"]) == {"draws"}
    assert overlap["null_mean"].between(0, 1).all()
    covered = table[table["metric"].isin(set(COVERAGES) - null.keeps)]
    assert set(covered["null_from"]) <= {"closed form"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert null.description in summary["methods"]
    page = (tmp_path / "index.html").read_text()
    assert f"replaces W₁ by {null.description}" in page


def test_coverage_cannot_be_tested_with_the_null_that_keeps_it():
    base, tuned = random_updates(4, 0.3)
    summary = compare(base, [tuned], leading=8, null="energy", draws=3).summary()
    assert summary["coverage"]["verdict"] == "undecided"
    assert summary["coverage"]["p_value"] is None
    assert summary["coverage"]["null_mean"] is None
    assert "The null energy keeps the coverage of each update exactly" in summary["coverage"]["note"]
    assert "Overlap was compared with 3 draws of the energy null" in summary["methods"]
    assert summary["stability"]["null_mean"] is not None


@pytest.mark.parametrize("null", ["scrambled-left", "energy"])
def test_checkpoints_share_beside_draws(null):
    base, one = random_updates(3, 0.3)
    two = {name: W + 0.1 * (one[name] - W).flip(0) for name, W in base.items()}
    sharing = compare(base, [one, two], leading=8, null=null, draws=3).sharing
    overlap = sharing[sharing["metric"] == "subspace_overlap"]
    assert set(overlap["null"]) == {null}
    assert overlap["null_mean"].between(0, 1).all()


def test_the_null_in_the_base_needs_its_vectors(update):
    with pytest.raises(InputError, match="drawn in the singular vectors of the base"):
        next(ENERGY.draws(update, 1, 0, "W", "a"))


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
    with pytest.raises(
        InputError,
        match=f"pass one of {', '.join(NULLS)}, a Null, or None for no draws",
    ):
        compare({}, [{}], null=null)
