"""`leading_svd` finds the true triplets, of any shape and dtype, and says truthfully how well."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralbasis.linalg import leading_svd, principal_angles, singular_values
from spectralbasis.linalg.svd import gram_pays
from tests.matrices import power_law, with_spectrum


def largest_sine(found, true) -> float:
    return float(torch.sin(principal_angles(found, true)).max())


@pytest.mark.parametrize("shape", [(48, 40), (300, 300), (300, 900), (900, 300), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_agrees_with_numpy(shape, share):
    short = min(shape)
    k = max(1, round(share * short))
    A, _, _ = with_spectrum(*shape, power_law(short))
    U, S, Vh = np.linalg.svd(A.numpy(), full_matrices=False)
    found = leading_svd(A, k)
    torch.testing.assert_close(found.S, torch.from_numpy(S[:k]), rtol=1e-9, atol=1e-12)
    assert largest_sine(found.U, torch.from_numpy(U[:, :k])) < 1e-6
    assert largest_sine(found.Vh.T, torch.from_numpy(Vh[:k].T)) < 1e-6
    assert found.subspace_error_bound < 1e-6


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 90), n=st.integers(1, 90), rank=st.integers(0, 90), seed=st.integers(0, 99), data=st.data())
def test_factors_are_orthonormal_and_residuals_true_whatever_the_rank(m, n, rank, seed, data):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, m, n)
    A = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)
    k = data.draw(st.integers(1, min(m, n)))
    found = leading_svd(A, k)
    eye = torch.eye(k)
    torch.testing.assert_close(found.U.T @ found.U, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye, rtol=0, atol=1e-5)
    scale = float(torch.linalg.matrix_norm(A)) + 1e-30
    assert float((A @ found.Vh.T - found.U * found.S).norm()) <= 1e-5 * scale * k
    assert float(found.residuals.max()) <= 1e-6 * scale * k
    left = torch.linalg.vector_norm(A.double().T @ found.U.double() - found.Vh.double().T * found.S.double(), dim=0)
    assert bool((left <= found.residuals.double() + 1e-6 * scale).all())
    assert 0 <= found.subspace_error_bound <= 1


@pytest.mark.parametrize("k", [3, 20, 64])
def test_the_bound_holds_for_the_subspace_that_was_planted(k):
    spectrum = power_law(200)
    A, U, V = with_spectrum(400, 200, spectrum)
    found = leading_svd(A.float(), k)
    error = max(largest_sine(found.U, U[:, :k]), largest_sine(found.Vh.T, V[:, :k]))
    # Rounding A to float32 moves the true subspaces by at most its norm over the gap: that is not the solver's doing.
    rounding = float(torch.linalg.matrix_norm(A - A.float().double(), 2)) / float(spectrum[k - 1] - spectrum[k])
    assert error <= found.subspace_error_bound + rounding + 1e-6


def test_without_a_gap_nothing_is_claimed():
    A, _, _ = with_spectrum(120, 100, torch.tensor([3.0, 2.0, 2.0, 1.0]))
    assert leading_svd(A, 2).subspace_error_bound == 1.0
    assert leading_svd(A, 3).subspace_error_bound < 1e-8


def test_all_directions_of_a_square_matrix_cannot_be_wrong():
    assert leading_svd(torch.eye(5), 5).subspace_error_bound == 0.0


def test_a_zero_matrix_has_zero_values_and_no_certain_subspace():
    found = leading_svd(torch.zeros(80, 70), 3)
    assert found.S.tolist() == [0, 0, 0]
    assert found.subspace_error_bound == 1.0
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(3), rtol=0, atol=1e-6)


def test_what_the_gram_matrix_cannot_certify_is_solved_densely_and_says_so():
    spectrum = torch.cat([torch.tensor([1.0, 1e-10]), torch.full((98,), 1e-12)])
    A, U, _ = with_spectrum(100, 100, spectrum)
    found = leading_svd(A, 2, tolerance=1e-3)
    assert gram_pays(100, 100, 2)
    assert found.solver == "dense (gram missed the tolerance)"
    assert largest_sine(found.U, U[:, :2]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_low_precision_is_decomposed_as_the_numbers_it_holds(dtype):
    A = with_spectrum(130, 90, power_law(90))[0].to(dtype)
    found = leading_svd(A, 5)
    expected = np.linalg.svd(A.double().numpy(), compute_uv=False)[:5]
    assert found.S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(found.S.double().numpy(), expected, rtol=1e-6)


def test_next_singular_value_is_the_one_left_out():
    A = torch.randn(200, 150)
    expected = singular_values(A)
    assert leading_svd(A, 10).next_singular_value == pytest.approx(float(expected[10]), rel=1e-6)
    assert leading_svd(A, 150).next_singular_value == 0.0


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range_says_what_to_pass(k):
    with pytest.raises(ValueError, match=r"outside 1\.\.min\(m, n\)=4 .*pass k<=4"):
        leading_svd(torch.ones(4, 6), k)


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.ones(3), "expected a non-empty real matrix"),
        (torch.ones(0, 3), "expected a non-empty real matrix"),
        (torch.ones(2, 2, dtype=torch.int64), "expected a non-empty real matrix"),
    ],
)
def test_what_is_no_finite_matrix_is_refused(A, message):
    with pytest.raises(ValueError, match=message):
        leading_svd(A, 1)
