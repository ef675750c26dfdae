"""A known change is measured as what it is."""

import math

import pytest
import torch

from spectralbasis import compare
from spectralbasis.comparison import metrics
from tests.comparison.pairs import layered, rotated_pair, value
from tests.matrices import orthonormal, power_law, with_spectrum


def table_of(W0, W1, k):
    return compare(layered({"0.dense": W0}), [layered({"0.dense": W1})], leading=k, null=None).table


@pytest.mark.parametrize("k", [2, 8, 13])
@pytest.mark.parametrize("angle", [0.02, 0.4, 1.0])
def test_a_rotation_out_of_the_leading_subspace(k, angle):
    table = table_of(*rotated_pair(k, angle), k)
    assert value(table, "subspace_overlap", k=k, side="left") == pytest.approx(1 - math.sin(angle) ** 2 / k, abs=1e-4)
    assert value(table, "subspace_overlap", k=k, side="right") == pytest.approx(1, abs=1e-4)
    assert value(table, "matched_cosine", k=k, side="left", index=0) == pytest.approx(math.cos(angle), abs=1e-4)
    assert value(table, "matched_cosine", k=k, side="left", index=1) == pytest.approx(1, abs=1e-4)


def test_a_swap_of_two_directions_keeps_the_subspace_and_the_assigned_cosines():
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    W0, U, V = with_spectrum(30, 20, spectrum)
    swapped = (U * spectrum[[1, 0, 2, 3]]) @ V.T
    table = table_of(W0, swapped, 3)
    for index, matched in enumerate([0, 0, 1]):
        assert value(table, "matched_cosine", k=3, side="left", index=index) == pytest.approx(matched, abs=1e-5)
        assert value(table, "assigned_cosine", k=3, side="left", index=index) == pytest.approx(1, abs=1e-5)
    assert value(table, "subspace_overlap", k=3, side="right") == pytest.approx(1, abs=1e-6)


def test_planted_diagonal_and_core_updates_are_covered_as_planted():
    k, m, n = 6, 50, 40
    W0, U, V = with_spectrum(m, n, power_law(n))
    diagonal = (U[:, :k] * torch.linspace(1, 2, k, dtype=torch.float64)) @ V[:, :k].T * 1e-2
    core = U[:, :k] @ orthonormal(k, k, 5) @ V[:, :k].T * 1e-2
    outside = torch.outer(U[:, k + 1], V[:, k + 2])
    outside *= diagonal.norm() / outside.norm()

    table = table_of(W0, W0 + diagonal, k)
    assert value(table, "coverage_diagonal", k=k) == pytest.approx(1, abs=1e-4)
    half = table_of(W0, W0 + diagonal + outside, k)
    for metric, side in [("diagonal", "both"), ("core", "both"), ("left", "left"), ("right", "right")]:
        assert value(half, f"coverage_{metric}", k=k, side=side) == pytest.approx(0.5, abs=1e-4)

    table = table_of(W0, W0 + core, k)
    expected = float(orthonormal(k, k, 5).diagonal().square().sum()) / k
    assert value(table, "coverage_core", k=k) == pytest.approx(1, abs=1e-4)
    assert value(table, "coverage_diagonal", k=k) == pytest.approx(expected, abs=1e-4)


def test_half_of_the_directions_cover_their_share():
    W0, U, V = with_spectrum(50, 40, power_law(40))
    update = (U[:, :4] * torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)) @ V[:, :4].T
    table = table_of(W0, W0 + 1e-2 * update, 4)
    assert value(table, "coverage_diagonal", k=2) == pytest.approx(0.2, abs=1e-4)
    assert value(table, "coverage_left", k=1, side="left") == pytest.approx(0.1, abs=1e-4)


def test_scaling_shifts_every_singular_value_and_turns_nothing():
    W0, _, _ = with_spectrum(30, 20, power_law(20))
    table = table_of(W0, 1.25 * W0, 5)
    shifts = table[table.metric == "singular_value_shift"]["value"]
    assert shifts.tolist() == pytest.approx([0.25] * 5, abs=1e-5)
    assert value(table, "subspace_overlap", k=5, side="left") == pytest.approx(1, abs=1e-6)
    assert value(table, "update_norm_relative", k=5) == pytest.approx(0.25, abs=1e-5)


def test_ranks_of_known_spectra():
    flat, steep = torch.ones(7, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert metrics.effective_rank(flat) == pytest.approx(7)
    assert metrics.stable_rank(flat) == pytest.approx(7)
    assert metrics.effective_rank(steep) == pytest.approx(1)
    assert metrics.stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("k", "grid"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_the_grid_ends_at_k(k, grid):
    assert metrics.leading_grid(k) == grid
