"""One matrix, before and after: measured, and held against draws of a null."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spectralbasis.checkpoints import Matrix
from spectralbasis.comparison import metrics
from spectralbasis.comparison.metrics import Key, Measurements
from spectralbasis.comparison.nulls import NULLS, draw_generator
from spectralbasis.comparison.rows import Row
from spectralbasis.comparison.statistics import against_null
from spectralbasis.errors import InputError
from spectralbasis.linalg import Leading, leading_svd
from spectralbasis.triplets import Triplets


@dataclass(frozen=True)
class Settings:
    """What is measured: the same settings on the same weights give the same rows.

    Attributes:
        leading: number of directions, fraction of min(m, n), "mp" or "gd".
        null: "scrambled", "gaussian" or None for no draws.
        draws: draws of the null per matrix.
        seed: of the draws and of the bootstrap.
        tolerance: largest sine between computed and true leading subspaces.
        device: where matrices are decomposed.
    """

    leading: Leading = 64
    null: str | None = "scrambled"
    draws: int = 5
    seed: int = 0
    tolerance: float = 1e-4
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.null is not None and self.null not in NULLS:
            raise InputError(f"null={self.null!r} is unknown; pass one of {', '.join(NULLS)}, or none for no draws")
        if self.null is not None and self.draws < 1:
            raise InputError(f"draws={self.draws} draws nothing; pass 2 or more, or null=None")


def measure_pair(
    W0: Tensor, W1: Tensor, base: Triplets, settings: Settings, tuned_hash: str
) -> tuple[Measurements, dict[Key, list[float]]]:
    """All measurements of one pair, and the null's values of those that have a null.

    Args:
        W0: base matrix, (m, n), float32.
        W1: finetuned matrix, (m, n), float32, not equal to W0.
        base: leading triplets of W0.
        settings: what to measure.
        tuned_hash: content hash of W1, which fixes the draws.
    """
    update = W1 - W0
    tuned = leading_svd(W1, base.k, tolerance=settings.tolerance)
    update_norm = float(leading_svd(update, 1, tolerance=1.0).S[0])
    values = (
        metrics.overlaps(base, tuned)
        | metrics.haar_overlaps(base.shape, base.k)
        | metrics.cosines(base, tuned)
        | metrics.wedin_bounds(base, tuned, update_norm)
        | metrics.coverages(base, update)
        | metrics.spectra(base, tuned)
        | metrics.sizes(W0, W1, base.k)
    )
    return values, _null_values(W0, update, base, settings, tuned_hash)


def _null_values(
    W0: Tensor, update: Tensor, base: Triplets, settings: Settings, tuned_hash: str
) -> dict[Key, list[float]]:
    values: dict[Key, list[float]] = defaultdict(list)
    for draw in range(settings.draws if settings.null else 0):
        generator = draw_generator(settings.seed, base.base_hash, tuned_hash, draw)
        chance = NULLS[str(settings.null)](update, generator)
        moved = leading_svd(W0 + chance, base.k, tolerance=settings.tolerance)
        for key, value in (metrics.overlaps(base, moved) | metrics.coverages(base, chance)).items():
            values[key].append(value)
    return values


def pair_rows(
    tuned: str,
    matrix: Matrix,
    values: Measurements,
    null_values: dict[Key, list[float]],
    null: str | None,
) -> Iterable[Row]:
    """The measurements of one pair as rows of the table."""
    for key, value in values.items():
        metric, side, k, index = key
        m, n = matrix.shape
        row = Row(tuned, matrix.name, matrix.layer, matrix.kind, m, n, k, metric, side, index, value)
        if key in null_values:
            fit = against_null(value, np.array(null_values[key]))
            row = replace(row, null=null or "", **asdict(fit))
        yield row


def as_float(W: Tensor, device: str) -> Tensor:
    """The matrix in float32 where the comparison works on it."""
    return W.to(device=device, dtype=torch.float32)
