"""Matrices whose leading singular subspaces are known, kept on disk because the full decomposition is slow."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """A float32 matrix and its k leading singular vectors from a full decomposition in float64.

    Attributes:
        A: (m, n) float32.
        U: (m, k) float64.
        S: all singular values, (min(m, n),) float64.
        Vh: (k, n) float64.
    """

    A: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def k(self) -> int:
        """Number of leading triplets."""
        return self.U.shape[1]

    @property
    def relative_gap(self) -> float:
        """`(σ_k − σ_{k+1}) / σ_k`: how well the leading subspace is set apart."""
        return float((self.S[self.k - 1] - self.S[self.k]) / self.S[self.k - 1])

    def errors(self, U: Tensor, Vh: Tensor) -> tuple[float, float]:
        """Largest sine between the computed and the true leading subspace, left and right."""
        return _largest_sine(self.U, U), _largest_sine(self.Vh.T, Vh.T)


def load_problem(m: int, n: int, k: int, spectrum: str, folder: Path) -> Problem:
    """The problem of this shape and spectrum, from `folder` where an earlier run left it."""
    path = folder / f"{spectrum}-{m}x{n}-k{k}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        A = SPECTRA[spectrum](m, n, k).float()
        U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        tensors = {"A": A, "U": U[:, :k], "S": S, "Vh": Vh[:k]}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return Problem(**load_file(path))


def steep(m: int, n: int, k: int) -> Tensor:
    """Singular values 1, 1/2, 1/3, …: each direction stands out from the next, the k-th by a k-th."""
    rank = min(m, n)
    values = 1 / torch.arange(1, rank + 1, dtype=torch.float64)
    return (_orthonormal(m, rank, seed=0) * values) @ _orthonormal(n, rank, seed=1).T


def flat(m: int, n: int, k: int) -> Tensor:
    """Independent normal entries, whose largest singular value is about 1, and k planted directions barely above."""
    generator = torch.Generator().manual_seed(2)
    bulk = torch.randn(m, n, generator=generator, dtype=torch.float64) / (m**0.5 + n**0.5)
    head = torch.linspace(2.0, 0.8, k, dtype=torch.float64)
    return bulk + (_orthonormal(m, k, seed=3) * head) @ _orthonormal(n, k, seed=4).T


def stretched(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """Random singular vectors and the spectrum of another matrix at this size, in float32.

    Args:
        m: rows.
        n: columns.
        values: singular values of the other matrix, descending; read between them where there are fewer.
        seed: of the vectors.
    """
    rank = min(m, n)
    places = (torch.arange(rank, dtype=torch.float64) + 0.5) / rank * len(values) - 0.5
    lower = places.floor().clamp(0, len(values) - 2).long()
    between = values[lower] + (places - lower) * (values[lower + 1] - values[lower])
    left, right = (_orthonormal(side, rank, 2 * seed + turn, torch.float32) for turn, side in enumerate((m, n)))
    return (left * between.clamp_min(0).float()) @ right.T


def _orthonormal(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=dtype))[0]


def _largest_sine(true: Tensor, computed: Tensor) -> float:
    Q = torch.linalg.qr(computed.double())[0]
    return float(torch.linalg.matrix_norm(Q - true @ (true.T @ Q), 2))


SPECTRA = {"steep": steep, "flat": flat}
