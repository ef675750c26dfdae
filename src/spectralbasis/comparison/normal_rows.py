"""The numbers of `torch.randn` by rows, without all of them."""

from functools import lru_cache

import torch
from torch import Tensor

from spectralbasis.linalg import row_source
from spectralbasis.linalg.row_source import Rows, RowSource

TOGETHER = 16
"""How many normal numbers torch makes of as many uniform ones at once, so that 16 more continue where it stopped."""


def normal_rows(shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> RowSource:
    """`torch.randn(shape, generator=generator, dtype=torch.float64)` in float32, a run of rows at a time.

    The state of the generator before each run is kept; what the generator is left with is that of the whole draw. Runs
    of rows can be read, single ones cannot.

    Args:
        shape: (m, n).
        generator: a CPU generator.
        device: where the rows come to lie.
    """
    m, n = shape
    height = TOGETHER * max(1, row_source.BLOCK_ENTRIES // (TOGETHER * n))
    starts = range(0, max(1, m - TOGETHER + 1), height)  # the last run is never shorter than what is made together
    stops = [*starts[1:], m]
    states = []
    for start, stop in zip(starts, stops, strict=True):
        states.append(generator.get_state())
        torch.randn(stop - start, n, generator=generator, dtype=torch.float64)

    @lru_cache(maxsize=1)
    def run(number: int) -> Tensor:
        own = torch.Generator()
        own.set_state(states[number])
        return torch.randn(stops[number] - starts[number], n, generator=own, dtype=torch.float64).to(torch.float32)

    def read(rows: Rows) -> Tensor:
        if not isinstance(rows, slice):
            raise TypeError(f"normal numbers are drawn in their order; expected a slice of rows, got {type(rows)}")
        start, stop, _ = rows.indices(m)
        first = min(start // height, len(starts) - 1)
        parts = [run(number) for number in range(first, len(starts)) if starts[number] < stop]
        return torch.cat(parts)[start - starts[first] : stop - starts[first]].to(device)

    return RowSource(shape, read, device)
