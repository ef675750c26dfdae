"""Cosines with every left singular vector of a matrix."""

import torch
from torch import Tensor

from spectralbasis.linalg.eigen import eigenvector_products
from spectralbasis.linalg.products import gram, transposed_times
from spectralbasis.linalg.row_source import MatrixLike


def largest_cosines(W: MatrixLike, X: Tensor) -> Tensor:
    """The largest `|cos|` of each column of X with any left singular vector of W, (j,), float64.

    A tensor is decomposed in full. Of a row source, the right vectors come from the Gram matrix, and the left ones from
    them: directions whose singular value is below 1e-8 of the largest are noise there, and are left out.

    Args:
        W: (m, n).
        X: (m, j) float64, columns of norm 1.
    """
    if isinstance(W, Tensor):
        every = torch.linalg.svd(W.double(), full_matrices=False).U
        return (every.T @ X).abs().amax(0)
    if W.shape[0] < W.shape[1]:
        return eigenvector_products(gram(W.T), X)[1].abs().amax(0)
    squares, products = eigenvector_products(gram(W), transposed_times(W, X))
    clear = squares > 1e-16 * squares[0]
    return (products[clear] / squares[clear].sqrt()[:, None]).abs().amax(0)
