"""Overlaps, angles and cosines against closed forms, and blind to signs and to rotations that mean nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralbasis.linalg import (
    assigned_cosines,
    cross_cosines,
    haar_overlap,
    haar_overlap_std,
    matched_cosines,
    overlaps_by_k,
    principal_angles,
    subspace_overlap,
)
from tests.matrices import orthonormal

frames = {"rows": st.integers(2, 40), "seed": st.integers(0, 1000), "data": st.data()}


@settings(max_examples=50, deadline=None)
@given(**frames)
def test_overlap_is_in_range_symmetric_and_blind_to_rotations_inside(rows, seed, data):
    k = data.draw(st.integers(1, rows))
    U0, U1, Q = orthonormal(rows, k, seed), orthonormal(rows, k, seed + 1), orthonormal(k, k, seed + 2)
    overlap = subspace_overlap(U0, U1)
    assert 0 <= overlap <= 1
    assert subspace_overlap(U1, U0) == pytest.approx(overlap)
    assert subspace_overlap(U0 @ Q, U1) == pytest.approx(overlap)
    assert subspace_overlap(U0, U0 @ Q) == pytest.approx(1)


@settings(max_examples=50, deadline=None)
@given(**frames)
def test_overlap_is_the_mean_square_of_the_cosines_of_the_angles(rows, seed, data):
    k = data.draw(st.integers(1, rows))
    U0, U1 = orthonormal(rows, k, seed), orthonormal(rows, k, seed + 1)
    angles = principal_angles(U0, U1)
    assert bool((angles.diff() >= 0).all())
    assert subspace_overlap(U0, U1) == pytest.approx(float(angles.cos().square().mean()), abs=1e-12)


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.3, math.pi / 2 - 1e-9])
def test_a_planted_angle_is_found_small_or_large(angle):
    Q = orthonormal(30, 4)
    turned = torch.stack([Q[:, 0], Q[:, 1], math.cos(angle) * Q[:, 2] + math.sin(angle) * Q[:, 3]], 1)
    found = principal_angles(Q[:, :3], turned)
    np.testing.assert_allclose(found.numpy(), [0, 0, angle], rtol=1e-6, atol=1e-12)
    assert subspace_overlap(Q[:, :3], turned) == pytest.approx(1 - math.sin(angle) ** 2 / 3, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(**frames)
def test_cosines_ignore_signs(rows, seed, data):
    k = data.draw(st.integers(1, rows))
    U0, U1 = orthonormal(rows, k, seed), orthonormal(rows, k, seed + 1)
    signs = torch.tensor(data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=k, max_size=k)))
    plain, flipped = cross_cosines(U0, U1), cross_cosines(U0, U1 * signs)
    torch.testing.assert_close(matched_cosines(plain), matched_cosines(flipped))
    torch.testing.assert_close(assigned_cosines(plain), assigned_cosines(flipped))
    torch.testing.assert_close(overlaps_by_k(plain), overlaps_by_k(flipped))


def test_assignment_undoes_a_swap():
    U = orthonormal(20, 4)
    cross = cross_cosines(U, U[:, [0, 2, 1, 3]])
    torch.testing.assert_close(matched_cosines(cross), torch.tensor([1.0, 0, 0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(assigned_cosines(cross), torch.ones(4, dtype=torch.float64))


def test_overlaps_by_k_are_those_of_the_leading_columns():
    U0, U1 = orthonormal(25, 8, 3), orthonormal(25, 8, 4)
    by_k = overlaps_by_k(cross_cosines(U0, U1))
    for k in range(1, 9):
        assert float(by_k[k - 1]) == pytest.approx(subspace_overlap(U0[:, :k], U1[:, :k]))


def test_random_subspaces_overlap_by_k_over_m():
    m, k, pairs = 60, 6, 300
    overlaps = [subspace_overlap(orthonormal(m, k, 2 * i), orthonormal(m, k, 2 * i + 1)) for i in range(pairs)]
    error = float(np.std(overlaps)) / math.sqrt(pairs)
    assert abs(float(np.mean(overlaps)) - haar_overlap(m, k)) < 4 * error


def test_frames_of_different_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 2\) and \(5, 3\)"):
        subspace_overlap(orthonormal(5, 2), orthonormal(5, 3))


@pytest.mark.parametrize(("m", "k"), [(2, 1), (5, 2), (8, 7), (30, 10)])
def test_the_spread_of_haar_random_overlaps_is_that_of_draws(m, k):
    rng = np.random.default_rng(0)
    frames = np.linalg.qr(rng.normal(size=(4000, m, k)))[0]
    overlaps = np.square(frames[:, :k]).sum((1, 2)) / k
    assert haar_overlap_std(m, k) == pytest.approx(overlaps.std(), rel=0.06)


@pytest.mark.parametrize("m", [1, 2, 9])
def test_subspaces_that_are_everything_overlap_without_spread(m):
    assert (haar_overlap(m, m), haar_overlap_std(m, m)) == (1, 0)
