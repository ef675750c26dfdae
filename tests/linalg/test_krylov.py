"""Large matrices are solved by block Lanczos: no direction is missed, and the claimed error holds."""

import pytest
import torch

from spectralbasis.linalg import leading_svd, principal_angles
from spectralbasis.linalg.solvers import BLOCK, leading_right_space
from spectralbasis.linalg.svd import krylov_pays
from tests.matrices import orthonormal, power_law, with_spectrum


def largest_sine(found, true) -> float:
    return float(principal_angles(found, true).sin().max())


def noise_with_a_head(m, n, k):
    """Normal entries and k directions barely above them: a spectrum that falls slowly."""
    bulk = torch.randn(m, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / (m**0.5 + n**0.5)
    head = torch.linspace(2.0, 0.9, k, dtype=torch.float64)
    return bulk + (orthonormal(m, k, 3) * head) @ orthonormal(n, k, 4).T


@pytest.mark.parametrize("shape", [(600, 520), (520, 600), (1600, 512)])
@pytest.mark.parametrize("k", [1, 8, 40])
@pytest.mark.parametrize("spectrum", ["steep", "flat"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_the_error_is_within_the_bound_and_the_bound_within_the_tolerance(shape, k, spectrum, tolerance):
    A = with_spectrum(*shape, power_law(min(shape), 1.0))[0] if spectrum == "steep" else noise_with_a_head(*shape, k)
    A = A.float()
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    found = leading_svd(A, k, tolerance=tolerance)
    assert found.solver == "krylov" or tolerance < 1e-3
    assert found.subspace_error_bound <= tolerance
    error = max(largest_sine(found.U, U[:, :k]), largest_sine(found.Vh.T, Vh[:k].T))
    rounding = 2e-7 * k**0.5  # of the factors themselves, which are returned in float32
    assert error <= found.subspace_error_bound + rounding
    torch.testing.assert_close(found.S.double(), S[:k], rtol=1e-6, atol=0)
    assert found.next_singular_value == pytest.approx(float(S[k]), rel=1e-2)


@pytest.mark.parametrize("copies", [BLOCK, 20])
@pytest.mark.parametrize("at", ["top", "inside"])
def test_more_equal_values_than_a_block_has_vectors_are_not_taken_for_fewer(copies, at):
    above = torch.linspace(3.0, 2.0, 4) if at == "inside" else torch.empty(0)
    spectrum = torch.cat([above, torch.full((copies,), 1.5), torch.linspace(1.0, 0.1, 500 - copies)])
    A, U, V = with_spectrum(600, 512, spectrum)
    k = len(above) + copies
    found = leading_svd(A.float(), k)
    assert found.solver != "krylov"
    assert max(largest_sine(found.U, U[:, :k]), largest_sine(found.Vh.T, V[:, :k])) < 1e-5


def test_fewer_equal_values_than_a_block_has_vectors_are_all_found():
    spectrum = torch.cat([torch.full((BLOCK - 1,), 1.5), torch.linspace(1.0, 0.1, 400)])
    A, U, _ = with_spectrum(600, 512, spectrum)
    found = leading_svd(A.float(), BLOCK - 1)
    assert found.solver == "krylov"
    assert largest_sine(found.U, U[:, : BLOCK - 1]) < 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_matrix_does_not_matter(scale):
    A, U, _ = with_spectrum(600, 512, power_law(512))
    found = leading_svd((A * scale).float(), 10)
    assert found.solver == "krylov"
    assert largest_sine(found.U, U[:, :10]) < 1e-4


@pytest.mark.parametrize("rank", [1, 5, 30])
def test_a_matrix_of_low_rank_is_solved_right(rank):
    A, U, _ = with_spectrum(600, 512, torch.linspace(2.0, 1.0, rank))
    k = min(rank, 8)
    found = leading_svd(A, k)
    assert largest_sine(found.U, U[:, :k]) < 1e-5


def test_no_space_is_claimed_where_too_many_values_are_equal():
    assert leading_right_space(orthonormal(600, 512), 8, 1e-3) is None
    found = leading_svd(orthonormal(600, 512), 8)
    assert (found.subspace_error_bound, found.solver[:5]) == (1.0, "dense")


def test_the_same_matrix_has_the_same_triplets_again():
    A = noise_with_a_head(600, 512, 20).float()
    first, again = leading_svd(A, 20), leading_svd(A, 20)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.Vh, again.Vh)


@pytest.mark.parametrize(
    ("shape", "k", "expected"), [((512, 512), 8, True), ((511, 4096), 8, False), ((768, 768), 65, False)]
)
def test_it_is_used_where_it_pays(shape, k, expected):
    assert krylov_pays(*shape, k) is expected
