"""Null models: updates as large as the real one whose alignment to the base is left to chance."""

from collections.abc import Callable

import torch
import xxhash
from torch import Tensor

Null = Callable[[Tensor, torch.Generator], Tensor]


def scrambled(update: Tensor, generator: torch.Generator) -> Tensor:
    """`D1 P1 ΔW P2 D2`, with random permutations P and signs D: norm and singular values stay, alignment is lost.

    Args:
        update: ΔW, (m, n).
        generator: a CPU generator, the only source of randomness.
    """
    m, n = update.shape
    rows = torch.randperm(m, generator=generator).to(update.device)
    columns = torch.randperm(n, generator=generator).to(update.device)
    return update[rows][:, columns] * _signs(m, generator, update)[:, None] * _signs(n, generator, update)


def gaussian(update: Tensor, generator: torch.Generator) -> Tensor:
    """An update of independent normal entries, (m, n), with the Frobenius norm of ΔW."""
    noise = torch.randn(update.shape, generator=generator, dtype=torch.float64).to(update)
    return noise * (torch.linalg.matrix_norm(update) / torch.linalg.matrix_norm(noise))


NULLS: dict[str, Null] = {"scrambled": scrambled, "gaussian": gaussian}


def draw_generator(seed: int, *what: str | int) -> torch.Generator:
    """A generator for one draw, fixed by the seed and by what is drawn, whatever the order or place of work."""
    key = "/".join(str(part) for part in (seed, *what))
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(key.encode()) & 0x7FFFFFFFFFFFFFFF)


def _signs(size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(like)
