"""Values and vectors found in float32 count only where float64 certifies them; no direction is missed unnoticed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralbasis.linalg import leading_svd, leading_svd_and_values, principal_angles, singular_values, svd
from spectralbasis.linalg.svd import spectrum
from tests.matrices import power_law, with_spectrum

SPECTRA = {
    "falling": power_law(150, 0.4),
    "cluster at k": torch.cat([torch.linspace(2, 1, 6), torch.full((6,), 0.9), torch.linspace(0.8, 0.1, 138)]),
    "multiplicities": torch.repeat_interleave(torch.linspace(2, 0.2, 30), 5),
    "equal": torch.ones(150),
    "geometric": 0.9 ** torch.arange(150),
    "low rank": torch.cat([torch.linspace(2, 1, 20), torch.zeros(130)]),
    "one large": torch.cat([torch.tensor([1e4]), torch.linspace(2, 1, 149)]),
}


def largest_sine(found, true) -> float:
    return float(principal_angles(found, true).sin().max())


def effective_rank(values):
    shares = values / values.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def assert_right(found, A, k):
    """The subspaces are as near to the true ones as the bound says, and the values are the leading ones."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    rounding = 3e-7 * k**0.5 + (1e-14 / max(float((S[k - 1] - S[k]) / S[0]), 1e-14) if k < len(S) else 0)
    error = max(largest_sine(found.U, U[:, :k]), largest_sine(found.Vh.T, Vh[:k].T))
    assert error <= found.subspace_error_bound + rounding
    torch.testing.assert_close(found.S.double() / S[0], S[:k] / S[0], rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECTRA)),
    rows=st.sampled_from([150, 190]),
    k=st.integers(1, 37),
    tolerance=st.sampled_from([1e-3, 1e-4, 1e-6]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
    wide=st.booleans(),
    seed=st.integers(0, 50),
)
def test_every_solver_gives_the_leading_triplets_within_its_bound_or_nothing(
    name, rows, k, tolerance, scale, wide, seed
):
    A = (with_spectrum(rows, 150, SPECTRA[name], seed)[0] * scale).float()
    A = A.T.contiguous() if wide else A
    squared = svd._float32_gram(A.T if wide else A)
    candidates = [
        svd._gram_float32(A, k, tolerance, False)[0],
        svd._krylov(A, k, tolerance),
        svd._krylov(A, k, tolerance, squared[0]),
    ]
    for found in candidates:
        if found is not None:
            assert found.subspace_error_bound <= tolerance
            assert_right(found, A, k)
    assert_right(leading_svd(A, k, tolerance=tolerance), A, k)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 12])
def test_all_values_beside_the_triplets_give_the_effective_rank(name, k):
    A = with_spectrum(180, 150, SPECTRA[name])[0].float()
    true = torch.linalg.svdvals(A.double())
    for values in (leading_svd_and_values(A, k)[1], spectrum(A)):
        assert bool((values[1:] <= values[:-1]).all())
        assert effective_rank(values) == pytest.approx(effective_rank(true), rel=2e-5)
        torch.testing.assert_close(values[0], true[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 12, 36, 60, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-9])
def test_values_are_the_same_to_the_last_bit_whichever_solver_gave_the_triplets(name, k, dtype, tolerance):
    """A table must not depend on whether the triplets were cached, where the values are found without them."""
    A = with_spectrum(180, 150, SPECTRA[name])[0].to(dtype)
    found, values = leading_svd_and_values(A, k, tolerance=tolerance)
    assert torch.equal(values, svd.with_leading(spectrum(A), found.S))


@pytest.mark.parametrize("name", ["low rank", "geometric", "one large"])
def test_values_that_are_noise_in_float32_are_found_in_float64(name):
    A = with_spectrum(180, 150, SPECTRA[name])[0].float()
    assert torch.equal(spectrum(A), singular_values(A))


@pytest.mark.parametrize("wrong", ["left out", "twice"])
def test_a_direction_that_eigenvectors_lack_is_noticed(monkeypatch, wrong):
    A = with_spectrum(180, 150, SPECTRA["falling"])[0].float()
    solve = svd.leading_eigenpairs

    def lacking(G, k):
        squares, V = solve(G, min(k + 1, len(G)))
        V[:, 3] = V[:, -1] if wrong == "left out" else V[:, 2]
        return squares, V[:, :k]

    assert svd._gram_float32(A, 8, 1e-4, False)[0] is not None
    monkeypatch.setattr(svd, "leading_eigenpairs", lacking)
    assert svd._gram_float32(A, 8, 1e-4, False)[0] is None


def test_large_matrices_take_values_and_triplets_from_one_gram_matrix(monkeypatch):
    monkeypatch.setattr(svd, "VALUES_SIDE", 512)
    monkeypatch.setattr(svd, "gram", lambda A: pytest.fail("a second Gram matrix was formed"))
    A = with_spectrum(600, 520, power_law(520, 0.5))[0].float()
    found, values = leading_svd_and_values(A, 16)
    assert found.solver == "krylov"
    assert_right(found, A, 16)
    torch.testing.assert_close(values, torch.linalg.svdvals(A.double()), rtol=1e-4, atol=0)


def test_vectors_that_are_not_orthonormal_are_made_so():
    A, _, V = with_spectrum(180, 150, SPECTRA["falling"])
    for mixed in (V[:, :12] @ torch.diag(torch.linspace(1, 3, 12, dtype=torch.float64)), V[:, :12] + 1e-4 * V[:, 1:13]):
        U, S, found, residuals = svd.rayleigh_ritz(A, mixed)
        torch.testing.assert_close(found.T @ found, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(A @ found, U * S, rtol=0, atol=1e-12)
        torch.testing.assert_close(A.T @ U - found * S, residuals, rtol=0, atol=1e-11)


def test_products_that_drop_digits_are_not_taken_for_float32(monkeypatch):
    A = with_spectrum(180, 150, SPECTRA["falling"])[0].float()
    assert svd._float32_gram(A) is not None
    coarse = A + 2e-4 * A.abs() * torch.randn(A.shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(svd, "times_and_back", lambda _, X: (None, coarse.double().T @ (coarse.double() @ X)))
    assert svd._float32_gram(A) is None


def test_autocast_changes_nothing():
    A = with_spectrum(640, 600, power_law(600, 0.5))[0].float()
    found = leading_svd(A, 8), *leading_svd_and_values(A, 8)
    with torch.autocast("cpu", torch.bfloat16):
        again = leading_svd(A, 8), *leading_svd_and_values(A, 8)
    assert torch.equal(found[0].U, again[0].U)
    assert torch.equal(found[1].U, again[1].U)
    assert torch.equal(found[2], again[2])
