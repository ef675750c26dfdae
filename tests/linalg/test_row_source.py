"""A matrix that is read in row blocks is decomposed as the same matrix in memory is, and says so."""

import numpy as np
import pytest
import torch

from spectralbasis.linalg import leading_svd, leading_svd_and_values, principal_angles, row_blocks, singular_values
from spectralbasis.linalg.row_blocks import RowSource, equal, minus, plus, row_slices
from spectralbasis.linalg.svd import largest_cosines, trailing_vectors
from tests.matrices import orthonormal, power_law, with_spectrum

SHAPES = [(700, 530), (530, 700), (600, 600)]


def source(A, counts=None):
    """A row source that hands out the rows of a tensor, and notes how many at a time."""

    def read(rows):
        block = A[rows].clone()
        if counts is not None:
            counts.append(len(block))
        return block

    return RowSource(tuple(A.shape), read, A.device)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that every product takes many; the last one is cut."""
    monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", 9_000)


def largest_sine(found, true) -> float:
    return float(principal_angles(found, true).sin().max())


@pytest.mark.parametrize("shape", [(70, 53), (53, 70), (1, 9), (9, 1)])
def test_products_are_those_of_the_matrix(shape):
    A = torch.randn(shape)
    for factor, expected in [(source(A), A.double()), (source(A).T, A.double().T)]:
        m, n = expected.shape
        X, Y = torch.randn(n, 3, dtype=torch.float64), torch.randn(m, 3, dtype=torch.float64)
        torch.testing.assert_close(row_blocks.times(factor, X), expected @ X)
        torch.testing.assert_close(row_blocks.transposed_times(factor, Y), expected.T @ Y)
        there, back = row_blocks.times_and_back(factor, X)
        torch.testing.assert_close(there, expected @ X)
        torch.testing.assert_close(back, expected.T @ expected @ X)
        torch.testing.assert_close(row_blocks.gram(factor), expected.T @ expected)
        narrow = row_blocks.back_and_forth(factor, X.float(), 2.0)
        torch.testing.assert_close(narrow.double(), expected.T @ expected @ X / 4, rtol=1e-4, atol=1e-4)
        assert row_blocks.largest_modulus(factor) == float(A.abs().max())
    assert float(row_blocks.frobenius_norm(source(A))) == pytest.approx(float(A.double().norm()), rel=1e-12)


def test_the_gram_matrix_of_a_wide_one_takes_few_readings():
    read = []
    A = torch.randn(300, 2000)
    product = row_blocks.gram(source(A, read).T)
    torch.testing.assert_close(product, A.double() @ A.double().T)
    assert sum(read) <= 4 * len(A)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [8, 40])
def test_it_has_the_triplets_of_the_matrix_in_memory(shape, k):
    read = []
    A = with_spectrum(*shape, power_law(min(shape)))[0].float()
    expected, found = leading_svd(A, k), leading_svd(source(A, read), k)
    assert (expected.solver, found.solver) == ("krylov", "krylov (row blocks)")
    assert found.subspace_error_bound <= 1e-4
    error = max(largest_sine(found.U, expected.U), largest_sine(found.Vh.T, expected.Vh.T))
    assert error <= found.subspace_error_bound + expected.subspace_error_bound + 1e-6
    torch.testing.assert_close(found.S, expected.S, rtol=1e-6, atol=0)
    assert max(read) <= max(9_000 // shape[1], 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [60, 1.0])
def test_many_directions_and_all_values_come_from_the_gram_matrix(shape, k):
    short = min(shape)
    k = k if isinstance(k, int) else short
    A = with_spectrum(*shape, power_law(short))[0].float()
    U, S, Vh = np.linalg.svd(A.double().numpy(), full_matrices=False)
    found, values = leading_svd_and_values(source(A), k)
    assert found.solver == "gram (row blocks)"
    torch.testing.assert_close(values, torch.from_numpy(S), rtol=1e-9, atol=0)
    torch.testing.assert_close(values, singular_values(source(A)), rtol=1e-12, atol=0)
    assert found.subspace_error_bound <= 1e-4
    assert largest_sine(found.U, torch.from_numpy(U[:, :k])) < 1e-6
    assert largest_sine(found.Vh.T, torch.from_numpy(Vh[:k].T)) < 1e-6


def test_what_is_refused_a_full_decomposition_claims_no_more_than_it_knows():
    found = leading_svd(source(torch.eye(600, 512)), 8)
    assert (found.subspace_error_bound, found.solver) == (1.0, "gram (row blocks)")


@pytest.mark.parametrize("shape", [(100, 90), (90, 100)])
def test_what_the_gram_matrix_blurs_is_bounded_truthfully(shape):
    spectrum = torch.cat([torch.tensor([1.0, 1e-5]), torch.full((88,), 1e-6)])
    A = with_spectrum(*shape, spectrum)[0].float()
    U = torch.linalg.svd(A.double(), full_matrices=False).U
    found = leading_svd(source(A), 2, tolerance=1e-9)
    assert found.solver == "gram (row blocks)"
    assert largest_sine(found.U, U[:, :2]) <= found.subspace_error_bound + 1e-7
    assert found.subspace_error_bound < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_trailing_vectors_are_those_of_the_matrix(shape):
    A = with_spectrum(*shape, torch.linspace(3, 1, min(shape)))[0].float()
    for found, expected in zip(trailing_vectors(source(A), 5), trailing_vectors(A, 5), strict=True):
        assert largest_sine(found, expected) < 1e-6


def test_trailing_vectors_that_take_a_full_decomposition_are_refused():
    A = with_spectrum(60, 50, torch.logspace(0, -7, 50))[0].float()
    with pytest.raises(ValueError, match="allow more memory"):
        trailing_vectors(source(A), 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cosines_with_every_left_vector(shape):
    A = with_spectrum(*shape, torch.linspace(3, 0.1, min(shape)))[0].float()
    X = orthonormal(shape[0], 6, seed=5)
    torch.testing.assert_close(largest_cosines(source(A), X), largest_cosines(A, X), rtol=1e-6, atol=1e-9)


def test_sums_and_differences_are_taken_row_by_row():
    A, B = torch.randn(60, 50), torch.randn(60, 50)
    chosen = torch.tensor([5, 3, 3, 59])
    for found, expected in [(minus(source(A), source(B)), A - B), (plus(source(A), source(B)), A + B)]:
        assert torch.equal(found[10:20], expected[10:20])
        assert torch.equal(found[chosen], expected[chosen])
    assert equal(source(A), A)
    assert not equal(plus(source(A), source(B)), A)
    assert sum(rows.stop - rows.start for rows in row_slices(A)) == 60
