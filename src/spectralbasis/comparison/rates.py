"""How fast a machine does each kind of work, from a measurement of a few seconds."""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from spectralbasis.comparison.nulls import scrambled
from spectralbasis.comparison.operations import FLOAT32, Work
from spectralbasis.linalg.eigen import eigenvalues
from spectralbasis.linalg.krylov import BLOCK
from spectralbasis.linalg.products import back_and_forth, gram, times_and_back
from spectralbasis.triplets import matrix_hash

Clock = Callable[[], float]
Points = tuple[tuple[int, float], ...]
"""Smaller side of a matrix, and the amount per second there, by ascending side."""
REPEATS = 5
COLUMNS = 64
PASSES = 8
"""Passes through a float32 matrix in `_pass`."""
PIECE = 64_000_000
"""Bytes that are read to see how fast a disk is."""


@dataclass(frozen=True)
class Rates:
    """Amounts per second by kind of work.

    Attributes:
        by_side: kind → (smaller side of the matrix, amount per second), by ascending side; between two sides the rate
            is interpolated on logarithms, beyond them it is that of the last.
        overhead: seconds that each matrix takes whatever its size.
    """

    by_side: Mapping[str, Points]
    overhead: float = 0.0

    def seconds(self, work: Work, side: int) -> float:
        """How long work on a matrix of this smaller side takes, without the overhead."""
        return sum(amount / self.rate(kind, side) for kind, amount in work.items())

    def rate(self, kind: str, side: int) -> float:
        """Amount per second at this side."""
        points = self.by_side[kind]
        after = next((position for position, (known, _) in enumerate(points) if known >= side), len(points) - 1)
        (low, slow), (high, fast) = points[max(after - 1, 0)], points[after]
        if high == low or side >= high:
            return fast
        share = max(0.0, math.log(side / low) / math.log(high / low))
        return slow ** (1 - share) * fast**share


def calibrate(file: Path | None, threads: int, *, clock: Clock = time.perf_counter) -> Rates:
    """Measure this machine; takes a few seconds.

    Args:
        file: read to see how fast its disk is; None where no weights are read.
        threads: to compute with.
        clock: what time is taken by.
    """

    def measured(work: Callable[[Tensor], object], amount: Callable[[int], float], *sides: int) -> Points:
        return tuple((side, amount(side) / _typical(work, _matrix(side, side), clock)) for side in sides)

    with _threads(threads):
        return Rates(
            {
                "read": ((1, math.inf if file is None else read_rate(file, clock)),),
                "pass": measured(_pass, lambda side: PASSES * FLOAT32 * side**2, 512, 2048),
                "product64": measured(gram, lambda side: 2 * side**3, 256, 768, 1536),
                "thin64": measured(_thin64, lambda side: 4 * side**2 * COLUMNS, 384, 1024, 2048),
                "thin32": measured(_thin32, lambda side: 4 * side**2 * BLOCK, 512, 1024, 2048),
                "tridiagonal": measured(_tridiagonal, lambda side: 4 * side**3 / 3, 256, 512, 1024),
                "dense": measured(_dense, lambda side: 26 * side**3, 128, 384),
            }
        )


def read_rate(file: Path, clock: Clock = time.perf_counter) -> float:
    """Bytes per second that a file is read with; it is dropped from the system's cache first, where that can be."""
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, PIECE, os.POSIX_FADV_DONTNEED)
        started = clock()
        count = len(opened.read(PIECE))
        return count / max(clock() - started, 1e-9)


def _typical(work: Callable[[Tensor], object], A: Tensor, clock: Clock) -> float:
    """The median of the seconds that some calls take, after one to warm up."""
    work(A)
    seconds = []
    for _ in range(REPEATS):
        started = clock()
        work(A)
        seconds.append(clock() - started)
    return max(statistics.median(seconds), 1e-9)


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def _pass(A: Tensor) -> None:
    """Pass through a matrix `PASSES` times: scramble it (4), hash it (2), add (1), compare (1)."""
    drawn = scrambled(A, torch.Generator().manual_seed(0))
    matrix_hash(drawn)
    torch.equal(A + drawn, A)


def _thin64(A: Tensor) -> None:
    times_and_back(A, _matrix(A.shape[1], COLUMNS).double())


def _thin32(A: Tensor) -> None:
    back_and_forth(A, _matrix(A.shape[1], BLOCK), 1.0)


def _tridiagonal(A: Tensor) -> None:
    eigenvalues(A.double())


def _dense(A: Tensor) -> None:
    torch.linalg.svd(A.double(), full_matrices=False)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)
