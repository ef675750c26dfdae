"""The best approximation of a rank: its energy, the bound on what it misses, and where each solver takes over."""

import pytest
import torch

from spectralbasis.linalg import energy_error_bound, low_rank
from spectralbasis.linalg.row_blocks import RowSource
from tests.matrices import orthonormal, power_law, with_spectrum


def noise(n: int = 600, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n - 40, generator=torch.Generator().manual_seed(seed))


def lora_made(n: int = 600) -> torch.Tensor:
    """An update of rank 8, with the rounding of adding it to a weight in float32."""
    return with_spectrum(n, n, power_law(8))[0].float() + 1e-7 * torch.randn(n, n) / n**0.5


CASES = {
    "noise": noise,
    "power law": lambda: with_spectrum(600, 560, power_law(560))[0].float(),
    "wide": lambda: noise().T.contiguous(),
    "rank 8": lora_made,
    "small": lambda: noise(100),
    "equal values": lambda: orthonormal(600, 560).float(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [4, 40])
def test_the_energy_is_within_the_bound_of_the_best(case, k):
    A = CASES[case]()
    found = low_rank(A, k, tolerance=5e-5)
    squares = torch.linalg.svdvals(A.double()).square()
    best = float(squares[:k].sum())
    assert found.total == pytest.approx(float(squares.sum()), rel=1e-6)
    missed = 1 - found.held / best
    assert -1e-6 < missed <= found.error_bound + 1e-9
    if case != "equal values":
        assert found.error_bound <= 5e-5
    left = A.double() - (found.U.double() * found.S) @ found.Vh.double()
    assert float(left.square().sum()) == pytest.approx(found.total - found.held, rel=1e-4, abs=1e-9 * found.total)


def test_no_gap_is_needed():
    assert low_rank(noise(), 16, tolerance=5e-5).solver == "krylov"


def test_rows_that_are_read_when_asked_give_the_same():
    A = noise()
    source = RowSource(tuple(A.shape), lambda rows: A[rows].clone(), A.device)
    whole, blocks = low_rank(A, 16), low_rank(source, 16)
    assert blocks.held == pytest.approx(whole.held, rel=1e-5)
    assert blocks.solver.endswith("(row blocks)")


def test_nothing_is_certain_without_a_gap_to_what_was_kept():
    S = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert energy_error_bound(S, 0.1 * torch.eye(4, 2, dtype=torch.float64), 1) == 1.0
    assert energy_error_bound(S, torch.zeros(4, 2, dtype=torch.float64), 1) == 1.0
    assert energy_error_bound(torch.tensor([1.0, 0.5], dtype=torch.float64), torch.zeros(4, 2).double(), 1) == 0.0


def test_out_of_range():
    with pytest.raises(ValueError, match="outside 1"):
        low_rank(noise(), 561)
    with pytest.raises(ValueError, match="NaN"):
        low_rank(torch.full((4, 4), torch.nan), 1)
