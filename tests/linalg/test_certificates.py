"""Perturbation bounds hold where they can be checked against the truth."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralbasis.linalg import (
    leading_svd,
    principal_angles,
    subspace_error_bound,
    values_of_singular_vectors,
    vector_error_bounds,
    wedin_bound,
)
from spectralbasis.linalg.certificates import ritz_error_bound, triplet_residuals
from tests.matrices import orthonormal, power_law, with_spectrum


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), k=st.integers(1, 12), noise=st.floats(1e-8, 1e-1))
def test_residuals_over_the_gap_bound_the_error_of_any_nearby_factors(seed, k, noise):
    spectrum = power_law(30)
    A, U, V = with_spectrum(40, 30, spectrum, seed)
    generator = torch.Generator().manual_seed(seed)
    rough_U = torch.linalg.qr(U[:, :k] + noise * torch.randn(40, k, generator=generator, dtype=torch.float64))[0]
    rough_V = torch.linalg.qr(V[:, :k] + noise * torch.randn(30, k, generator=generator, dtype=torch.float64))[0]
    left, S, right = torch.linalg.svd(rough_U.T @ A @ rough_V)
    found_U, found_V = rough_U @ left, rough_V @ right.T
    residuals = triplet_residuals(A, found_U, S, found_V.T)
    bound = subspace_error_bound(S, residuals, float(spectrum[k]), (40, 30))
    error = max(float(principal_angles(f, t).sin().max()) for f, t in ((found_U, U[:, :k]), (found_V, V[:, :k])))
    assert error <= bound * (1 + 1e-6) + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 500),
    k=st.integers(1, 8),
    more=st.integers(1, 10),
    noise=st.floats(1e-10, 1e-2),
    exponent=st.floats(0.1, 2.0),
)
def test_ritz_triplets_bound_the_error_of_the_leading_ones_among_them(seed, k, more, noise, exponent):
    A, U, V = with_spectrum(40, 30, power_law(30, exponent), seed)
    p = k + more
    generator = torch.Generator().manual_seed(seed)
    rough = torch.linalg.qr(V[:, :p] + noise * torch.randn(30, p, generator=generator, dtype=torch.float64))[0]
    left, S, right = torch.linalg.svd(A @ rough, full_matrices=False)
    found = rough @ right.T
    bound = ritz_error_bound(S, A.T @ left - found * S, k)
    error = max(
        float(principal_angles(f, t).sin().max()) for f, t in ((left[:, :k], U[:, :k]), (found[:, :k], V[:, :k]))
    )
    assert error <= bound * (1 + 1e-6) + 1e-12


def test_a_wide_margin_makes_the_ritz_bound_far_tighter_than_the_gap_alone():
    spectrum = torch.cat([torch.linspace(2.0, 1.0, 10), torch.linspace(0.9999, 0.9, 5), torch.full((15,), 0.1)])
    A, _, V = with_spectrum(40, 30, spectrum)
    rough = torch.linalg.qr(V[:, :15] + 1e-7 * orthonormal(30, 15, 9))[0]
    left, S, right = torch.linalg.svd(A @ rough, full_matrices=False)
    R = A.T @ left - rough @ right.T * S
    alone = subspace_error_bound(S[:10], torch.linalg.vector_norm(R[:, :10], dim=0), float(S[10]), (40, 30))
    assert ritz_error_bound(S, R, 10) < alone / 100


def test_equal_values_around_k_leave_the_ritz_bound_at_one():
    assert ritz_error_bound(torch.tensor([2.0, 1.0, 1.0, 0.5]).double(), 1e-6 * orthonormal(9, 4), 2) == 1.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), k=st.integers(1, 12), size=st.floats(1e-6, 0.3))
def test_no_update_rotates_further_than_wedin_allows(seed, k, size):
    W0, _, _ = with_spectrum(40, 30, power_law(30), seed)
    update = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    update *= size / torch.linalg.matrix_norm(update, 2)
    before, after = leading_svd(W0, k), leading_svd(W0 + update, k)
    allowed = wedin_bound(float(before.S[-1]), after.next_singular_value, float(torch.linalg.matrix_norm(update, 2)))
    for first, second in ((before.U, after.U), (before.Vh.T, after.Vh.T)):
        assert float(principal_angles(first, second).sin().max()) <= allowed * (1 + 1e-6) + 1e-9


def test_a_vector_in_a_cluster_has_no_bound_and_its_neighbours_do():
    bounds = vector_error_bounds(torch.tensor([4.0, 2.0, 2.0, 1.0]), torch.full((4,), 1e-6), 0.5)
    assert bounds[1:3].tolist() == [1.0, 1.0]
    assert bounds[0] == pytest.approx(1e-6 / 2)
    assert bounds[3] == pytest.approx(1e-6 / 0.5)


def test_singular_vectors_have_their_values_and_other_directions_none():
    W, U, V = with_spectrum(40, 30, power_law(30))
    torch.testing.assert_close(values_of_singular_vectors(W, U[:, 5:9], V[:, 5:9]), power_law(30)[5:9])
    assert values_of_singular_vectors(W, U[:, [1, 0]], V[:, [0, 1]]) is None
    assert values_of_singular_vectors(W, U[:, :2], -V[:, :2]) is None
    assert values_of_singular_vectors(W, U[:, :2], orthonormal(30, 2, 5)) is None
    assert values_of_singular_vectors(W.bfloat16(), U[:, :2].bfloat16(), V[:, :2].bfloat16()) is None
    assert values_of_singular_vectors(torch.zeros(40, 30).double(), U[:, :2], V[:, :2]) is None


@pytest.mark.parametrize("rows", [2, 3, 7])
def test_the_ritz_bound_is_that_of_its_formula(rows):
    """Residuals of size 0.1 in orthogonal directions: outside is at most 1 + 0.2, there and back over a gap of 2."""
    R = 0.1 * torch.eye(max(rows, 3), 3, dtype=torch.float64)[:rows]
    distance = 5 - 1.2 - 0.1**2 / 2
    found = ritz_error_bound(torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64), R, 1)
    assert found == pytest.approx(0.1 / distance * math.hypot(1, 0.1 / 2))


def test_residuals_of_the_size_of_the_gaps_leave_the_ritz_bound_at_one():
    S = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    assert ritz_error_bound(S, 0.99 * torch.eye(3, dtype=torch.float64), 1) < 1
    assert ritz_error_bound(S, 1.0 * torch.eye(3, dtype=torch.float64), 1) == 1


def test_one_wrong_vector_among_right_ones_has_no_values():
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0]).double())
    E = torch.eye(3, dtype=torch.float64)
    slightly = E.clone()  # the second and the third direction turned by a thousandth
    slightly[1:, 1:] = torch.tensor([[math.cos(1e-3), -math.sin(1e-3)], [math.sin(1e-3), math.cos(1e-3)]])
    assert values_of_singular_vectors(W, E, E) is not None
    assert values_of_singular_vectors(W, E, slightly) is None
    assert values_of_singular_vectors(W, slightly, E) is None
