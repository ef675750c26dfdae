"""Null models: updates as large as the real one whose alignment to the base is left to chance."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
import xxhash
from torch import Tensor

from spectralbasis.comparison.normal_rows import normal_rows
from spectralbasis.linalg.products import frobenius_norm
from spectralbasis.linalg.row_source import Rows, RowSource

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
