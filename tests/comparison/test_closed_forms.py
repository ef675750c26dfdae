"""The null in closed form: coverage by enumeration, the overlap beside draws and second-order perturbation theory."""

from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy import stats

from spectralbasis import compare
from spectralbasis.comparison import nulls
from spectralbasis.comparison.coverage_moments import (
    UpdateSums,
    gaussian_coverage,
    one_sided_coverage,
    scrambled_coverage,
)
from spectralbasis.comparison.metrics import coverage_moments, coverage_shares
from spectralbasis.comparison.nulls import draw_generator
from spectralbasis.comparison.rotations import gaussian_energy, rotations, scrambled_energy, shared_overlap
from spectralbasis.comparison.statistics import against_moments
from tests.comparison.pairs import layered, random_updates
from tests.matrices import power_law, with_spectrum


def orthonormal(rows, columns, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((rows, columns)))[0]


def low_rank(m, n, rank, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n))


def test_the_moments_of_coverage_are_those_of_all_signed_permutations():
    A = torch.tensor([[1.0, -2.0], [0.3, 0.0], [4.0, 0.7]], dtype=torch.float64)
    U, Vh = (torch.from_numpy(orthonormal(size, 2, size)) for size in (3, 2))
    shares = []
    for rows, columns in product(permutations(range(3)), permutations(range(2))):
        moved = A[list(rows)][:, list(columns)]
        for signs in product((-1, 1), repeat=5):
            D1, D2 = torch.tensor(signs[:3]).double(), torch.tensor(signs[3:]).double()
            shares.append(coverage_shares(U, Vh.T, D1[:, None] * moved * D2))
    found = scrambled_coverage(UpdateSums.of(A, torch.linalg.svdvals(A).numpy()), U, Vh.T)
    for (metric, side), moments in found.items():
        for k in (1, 2):
            values = np.array([share[metric, side, k, -1] for share in shares])
            assert moments[k - 1].mean == pytest.approx(values.mean())
            assert moments[k - 1].std == pytest.approx(values.std(), abs=1e-7)


@pytest.mark.parametrize(("side", "shape"), [("left", (3, 2)), ("right", (2, 4)), ("left", (4, 4)), ("right", (3, 3))])
def test_the_moments_of_one_sided_coverage_are_those_of_all_signed_permutations_of_that_side(side, shape):
    A = torch.from_numpy(np.random.default_rng(0).standard_normal(shape)) * torch.arange(1.0, shape[1] + 1).double()
    U, Vh = (torch.from_numpy(orthonormal(size, 2, size)) for size in shape)
    size, shares = shape[side == "right"], []
    for order, signs in product(permutations(range(size)), product((-1, 1), repeat=size)):
        D = torch.tensor(signs).double()
        moved = D[:, None] * A[list(order)] if side == "left" else A[:, list(order)] * D
        shares.append(coverage_shares(U, Vh.T, moved))
    found = one_sided_coverage(side, A, UpdateSums.of(A, torch.linalg.svdvals(A).numpy()), U, Vh.T)
    assert set(found) == {("coverage_core", "both"), ("coverage_diagonal", "both"), (f"coverage_{side}", side)}
    for (metric, where), moments in found.items():
        for k in (1, 2):
            values = np.array([share[metric, where, k, -1] for share in shares])
            assert moments[k - 1].mean == pytest.approx(values.mean())
            assert moments[k - 1].std == pytest.approx(values.std(), abs=1e-7)
    other = "right" if side == "left" else "left"
    assert np.ptp([share[f"coverage_{other}", other, 2, -1] for share in shares]) < 1e-12


@pytest.mark.parametrize("null", [nulls.SCRAMBLED, nulls.SCRAMBLED_LEFT, nulls.SCRAMBLED_RIGHT])
def test_the_moments_of_coverage_are_those_of_4000_draws(null):
    A = torch.from_numpy(low_rank(14, 10, 3, 0)) + 0.2 * torch.from_numpy(low_rank(14, 10, 10, 1))
    U, Vh = torch.from_numpy(orthonormal(14, 4, 1)), torch.from_numpy(orthonormal(10, 4, 2)).T
    found = coverage_moments(null.coverage, A, UpdateSums.of(A, torch.linalg.svdvals(A).numpy()), U, Vh)
    shares = [coverage_shares(U, Vh, chance) for chance in null.draws(A, 4000, 0, "base", "tuned")]
    for key, (mean, std) in found.items():
        values = np.array([share[key] for share in shares])
        assert abs(values.mean() - mean) < 4 * std / 4000**0.5, key
        assert values.std() == pytest.approx(std, rel=0.1), key


def test_the_moments_of_gaussian_coverage_are_those_of_beta():
    sums = UpdateSums((12, 9), 0.1, 0.1, 0.1, 0.1)
    found = gaussian_coverage(sums, torch.zeros(12, 3), torch.zeros(3, 9))
    dimensions = {"coverage_left": 27, "coverage_right": 36, "coverage_core": 9, "coverage_diagonal": 3}
    for (metric, _), moments in found.items():
        law = stats.beta(dimensions[metric] / 2, (108 - dimensions[metric]) / 2)
        assert moments[2] == pytest.approx((law.mean(), law.std()))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_a_small_update_turns_as_in_second_order_perturbation_theory(shape, rank):
    m, n = shape
    p = min(shape)
    base, update = np.arange(p, 0, -1.0), np.linalg.svd(low_rank(m, n, rank, 0), compute_uv=False)
    update *= 1e-3 / np.linalg.norm(update)
    for k in (1, 4):
        i, j = base[:k, None] ** 2, base[None, k:] ** 2
        pairs = ((i + j) / (i - j) ** 2).sum()
        expected = [1e-6 / (m * n) * (pairs + (size - p) * (1 / base[:k] ** 2).sum()) / k for size in shape]
        for energy in (scrambled_energy(update, shape), gaussian_energy(update, shape)):
            found = rotations(base, energy, [k])
            assert [side.rotation for side in found[k]] == pytest.approx(expected, rel=2e-3)


CASES = [
    ("power law", "rank 3", 0.03, (4, 12)),
    ("power law", "full", 0.1, (4, 12)),
    ("flat", "full", 0.3, (12,)),
    ("flat", "power law", 0.01, (12,)),
]


def made(kind, m, n):
    p = min(m, n)
    if kind == "power law":
        return (orthonormal(m, p, 1) * np.arange(1, p + 1) ** -0.5) @ orthonormal(n, p, 2).T
    return low_rank(m, n, int(kind.split()[1]), 3) if kind.startswith("rank") else low_rank(m, n, 4 * p, 4)


def drawn_rotations(W0, update, k, draws):
    """1 − φ, left and right, under draws of the scrambled null, (draws, 2)."""
    U, _, Vh = np.linalg.svd(W0, full_matrices=False)
    found = []
    for number in range(draws):
        chance = nulls.scrambled(torch.from_numpy(update), draw_generator(0, number)).numpy()
        U1, _, Vh1 = np.linalg.svd(W0 + chance, full_matrices=False)
        cosines = U[:, :k].T @ U1[:, :k], Vh[:k] @ Vh1[:k].T
        found.append([1 - (one**2).sum() / k for one in cosines])
    return np.array(found)


def closed_and_drawn(base, kind, step, k, draws, shape=(60, 48)):
    """The two sides in closed form (None where refused), and the drawn rotations."""
    W0, update = made(base, *shape), made(kind, *shape)
    update *= step * np.linalg.norm(W0) / np.linalg.norm(update)
    values = [np.linalg.svd(one, compute_uv=False) for one in (W0, update)]
    found = rotations(values[0], scrambled_energy(values[1], shape), [k])
    return None if found is None else found[k], drawn_rotations(W0, update, k, draws)


@pytest.mark.parametrize(("base", "update", "step", "sizes"), CASES)
def test_the_closed_form_of_the_rotation_is_the_mean_of_draws(base, update, step, sizes):
    for k in sizes:
        sides, drawn = closed_and_drawn(base, update, step, k, 150)
        for number, side in enumerate(sides):
            values = drawn[:, number]
            error = values.std() / len(values) ** 0.5
            assert abs(side.rotation - values.mean()) < 0.05 * values.mean() + 3 * error
            assert side.std == pytest.approx(values.std(), rel=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["power law", "flat"])
@pytest.mark.parametrize("update", ["rank 1", "rank 4", "power law", "full"])
def test_what_is_admitted_is_within_5_percent_and_its_p_values_keep_their_rate(base, update):
    rates, admitted = [], 0
    for step in (0.003, 0.03, 0.1, 0.3):
        for k in (4, 16):
            sides, drawn = closed_and_drawn(base, update, step, k, 400, (80, 64))
            admitted += sides is not None
            for number, side in enumerate(sides or ()):
                values = drawn[:, number]
                error = values.std() / len(values) ** 0.5
                assert abs(side.rotation - values.mean()) < 0.05 * values.mean() + 3 * error, (step, k)
                p_values = np.array([against_moments(1 - value, *side.overlap).p_value for value in values])
                rates.append([(p_values < 0.05).mean(), (p_values < 0.01).mean()])
    assert admitted >= 3
    mean = np.mean(rates, axis=0)
    assert mean[0] < 0.07
    assert mean[1] < 0.025


def test_two_independent_updates_share_what_draws_share():
    W0, first, second = made("power law", 60, 48), made("full", 60, 48), made("rank 3", 60, 48)
    base = np.linalg.svd(W0, compute_uv=False)
    k, sides, frames = 8, [], []
    for update, step in ((first, 0.1), (second, 0.03)):
        update *= step * np.linalg.norm(W0) / np.linalg.norm(update)
        energy = scrambled_energy(np.linalg.svd(update, compute_uv=False), W0.shape)
        sides.append(rotations(base, energy, [k])[k][0])
        chances = (nulls.scrambled(torch.from_numpy(update), draw_generator(step * 100, i)).numpy() for i in range(150))
        frames.append([np.linalg.svd(W0 + chance)[0][:, :k] for chance in chances])
    shared = np.array([((a.T @ b) ** 2).sum() / k for a, b in zip(*frames, strict=True)])
    mean, std = shared_overlap(*sides, k)
    assert 1 - mean == pytest.approx(1 - shared.mean(), rel=0.1)
    assert std == pytest.approx(shared.std(), rel=0.4)


def test_the_closed_form_is_refused_where_it_does_not_hold():
    base = np.arange(20, 0, -1.0)

    def found(size, k=4, base=base, **options):
        return rotations(base, scrambled_energy(size * np.eye(20)[0], (30, 20)), [k], **options)

    assert found(0.1)
    assert found(60.0) is None, "the update's first direction is among the leading ones"
    assert found(0.1, k=20) is None, "all directions"
    assert found(0.1, base=np.ones(20)) is None, "no gap"
    assert found(1e-5, error_bound=1e-4) is None, "the solver's error is larger than the rotation"
    pair = np.array([20.0, 10.01, 10.0, 5.0, *np.full(16, 0.1)])
    assert found(0.3, k=2, base=pair) is None, "one pair of nearly equal values carries the rotation"


def test_the_table_says_what_each_null_comes_from():
    base, tuned = random_updates(4, 0.05)
    W0 = with_spectrum(48, 40, power_law(40))[0].float()
    spike = torch.outer(*(torch.from_numpy(orthonormal(size, 1, size)[:, 0]).float() for size in (48, 40)))
    base |= layered({"9.spiked": W0})
    tuned |= layered({"9.spiked": W0 + 3 * W0.norm() * spike})
    result = compare(base, [tuned], leading=8)
    table = result.table
    overlaps = table[table.metric == "subspace_overlap"]
    spiked = overlaps.matrix.str.contains("spiked")
    assert set(overlaps[~spiked].null_from) == {"closed form"}
    assert set(overlaps[spiked].null_from) == {"draws"}
    assert set(table[table.metric.str.startswith("coverage")].null_from) == {"closed form"}
    assert set(table[table.null == ""].null_from) == {""}
    summary = result.summary()
    assert summary["null_from"] == {"closed form": 4, "draws": 1}
    assert summary["draws"] == 5
    assert "in 4 of 5 matrices. In the other 1" in summary["methods"]
    forced = compare(base, [tuned], leading=8, draws=2)
    assert set(forced.table.null_from) == {"", "draws"}
    assert "compared with 2 draws of the scrambled null" in forced.summary()["methods"]


def test_the_closed_form_of_sharing_is_used_where_both_have_one():
    base, one = random_updates(3, 0.05)
    two = {name: W + 0.1 * (one[name] - W).flip(0) for name, W in base.items()}
    spike = torch.zeros(48, 40)
    spike[0, 0] = 300.0
    three = {name: W + spike for name, W in base.items()}
    sharing = compare(base, [one, two, three], leading=8, tasks=["a", "b", "c"]).sharing
    overlaps = sharing[sharing.metric == "subspace_overlap"]
    sources = overlaps.groupby(["tuned_a", "tuned_b"], sort=False).null_from.unique().map(list).tolist()
    assert sources == [["closed form"], ["draws"], ["draws"]]
    assert overlaps.null_mean.between(0, 1).all()
    assert set(sharing[sharing.metric != "subspace_overlap"].null_from) == {""}
