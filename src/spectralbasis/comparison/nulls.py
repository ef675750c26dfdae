"""Null models: updates as large as the real one whose alignment to the base is left to chance.

The numbers of `torch.randn` by rows, without all of them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import torch
import xxhash
from torch import Tensor

from spectralbasis.linalg import row_blocks
from spectralbasis.linalg.row_blocks import Rows, RowSource, frobenius_norm

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
    height = TOGETHER * max(1, row_blocks.BLOCK_ENTRIES // (TOGETHER * n))
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


Update = TypeVar("Update", Tensor, RowSource)
Null = Callable[[Update, torch.Generator], Update]


def scrambled(update: Update, generator: torch.Generator) -> Update:
    """`D1 P1 ΔW P2 D2`, with random permutations P and signs D: norm and singular values stay, alignment is lost.

    Args:
        update: ΔW, (m, n); a row source gives one, of the same values.
        generator: a CPU generator, the only source of randomness.
    """
    m, n = update.shape
    order = torch.randperm(m, generator=generator).to(update.device)
    columns = torch.randperm(n, generator=generator).to(update.device)
    row_signs, column_signs = _signs(m, generator, update), _signs(n, generator, update)

    def draw(rows: Rows) -> Tensor:
        return update[order[rows]][:, columns].mul_(row_signs[rows][:, None]).mul_(column_signs)

    return draw(slice(m)) if isinstance(update, Tensor) else RowSource((m, n), draw, update.device)


def gaussian(update: Update, generator: torch.Generator) -> Update:
    """An update of independent normal entries, (m, n), with the Frobenius norm of ΔW; arguments as of `scrambled`."""
    norm = frobenius_norm(update)
    if isinstance(update, Tensor):
        noise = torch.randn(update.shape, generator=generator, dtype=torch.float64).to(update)
        return noise * float(norm / frobenius_norm(noise))
    source = normal_rows(update.shape, generator, update.device)
    scale = float(norm / frobenius_norm(source))
    return replace(source, read=lambda rows: source[rows] * scale)


NULLS: dict[str, Null] = {"scrambled": scrambled, "gaussian": gaussian}


def draw_generator(seed: int, *what: str | int) -> torch.Generator:
    """A generator for one draw, fixed by the seed and by what is drawn, whatever the order or place of work."""
    key = "/".join(str(part) for part in (seed, *what))
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & 0x7FFFFFFFFFFFFFFF)


def _signs(size: int, generator: torch.Generator, like: Update) -> Tensor:
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(like.device, like.dtype)
