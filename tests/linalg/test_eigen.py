"""One reduction gives all eigenvalues and the leading eigenvectors, also of degenerate matrices."""

import numpy as np
import pytest
import torch

from spectralbasis.linalg.solvers import eigenvalues, leading_eigenpairs
from tests.matrices import orthonormal


def symmetric(values):
    Q = orthonormal(len(values), len(values))
    return (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T


CASES = {
    "one": symmetric([3.0]),
    "two": symmetric([3.0, -1.0]),
    "distinct": symmetric(np.linspace(5, -2, 40).tolist()),
    "repeated": symmetric([2.0] * 15 + [1.0] * 25),
    "low rank": symmetric([4.0, 3.0] + [0.0] * 38),
    "diagonal": torch.diag(torch.arange(40, dtype=torch.float64)),
    "identity": torch.eye(40, dtype=torch.float64),
    "zero": torch.zeros(40, 40, dtype=torch.float64),
    "tiny": 1e-200 * symmetric(np.linspace(5, 1, 40).tolist()),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_eigenpairs_and_leading(name):
    G = CASES[name]
    k = min(20, len(G))
    values, vectors = leading_eigenpairs(G.clone(), k)
    scale = float(G.abs().max()) + 1e-300
    expected = np.linalg.eigvalsh(G.numpy())[::-1].copy()
    torch.testing.assert_close(values / scale, torch.from_numpy(expected) / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-11)
    torch.testing.assert_close(G @ vectors / scale, vectors * values[:k] / scale, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_eigenvalues_alone_are_the_same_to_the_last_bit(name):
    G = CASES[name]
    assert torch.equal(eigenvalues(G.clone()), leading_eigenpairs(G.clone(), 1)[0])
