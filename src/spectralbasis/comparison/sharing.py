"""What two finetuned checkpoints of one base have in common in one matrix, beside what chance gives."""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spectralbasis.checkpoints import Matrix
from spectralbasis.comparison.metrics import Measurements, leading_grid, overlaps
from spectralbasis.comparison.rows import SharedRow
from spectralbasis.comparison.statistics import against_haar, against_null, against_unrelated
from spectralbasis.linalg import LeadingSVD, cross_cosines, leading_svd, overlaps_by_k
from spectralbasis.linalg.row_source import MatrixLike

UPDATE_DIRECTIONS = 8
"""How many leading directions of an update are held against those of another."""
Pair = tuple[str, str]
"""Labels of two finetuned checkpoints, in the order in which they were given."""
Place = tuple[str, str, str, int, str, int, int]


@dataclass(frozen=True)
class Frames:
    """What is kept of one finetuned matrix until it has met its siblings: k×(m+n) numbers and as many for each draw.

    Attributes:
        content: hash of the matrix.
        tuned: its leading triplets.
        draws: those of the base under each draw of the null for this matrix.
        update: those of ΔW, at most `UPDATE_DIRECTIONS`.
        base_overlaps: subspace overlaps of the base with `tuned`.
    """

    content: str
    tuned: LeadingSVD
    draws: tuple[LeadingSVD, ...]
    update: LeadingSVD
    base_overlaps: Measurements


def update_directions(update: MatrixLike, values: Tensor, base_norm: float) -> LeadingSVD:
    """Leading triplets of `ΔW`: `UPDATE_DIRECTIONS` of them, or fewer where its rank is lower.

    What lies below the rounding of float32 weights has no direction of its own.

    Args:
        update: ΔW, (m, n).
        values: its singular values.
        base_norm: `‖W0‖_F`.
    """
    m, n = update.shape
    rounding = torch.finfo(torch.float32).eps * base_norm * (m**-0.5 + n**-0.5)
    rank = int(torch.count_nonzero(values > rounding))
    return leading_svd(update, min(UPDATE_DIRECTIONS, max(rank, 1)))


def shared_rows(pair: Pair, matrix: Matrix, a: Frames, b: Frames, update_cosine: float, null: str) -> list[SharedRow]:
    """All measurements of one matrix between two checkpoints; swapping them changes nothing but `base_overlap`.

    Args:
        pair: their labels.
        matrix: the base matrix.
        a: frames of the first.
        b: frames of the second.
        update_cosine: `⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)`.
        null: which null `Frames.draws` come from; empty where there are none.
    """
    place = (*pair, matrix.name, matrix.layer, matrix.kind, *matrix.shape)
    whole = against_unrelated(update_cosine, matrix.shape)
    return [
        *_subspace_overlaps(place, a, b, null),
        SharedRow(*place, a.tuned.S.numel(), "update_cosine", "both", update_cosine, "haar", **asdict(whole)),
        *_update_overlaps(place, a, b),
    ]


def _subspace_overlaps(place: Place, a: Frames, b: Frames, null: str) -> list[SharedRow]:
    draws = [overlaps(one, other) for one, other in _independent_draws(a, b)]
    rows = []
    for key, value in overlaps(a.tuned, b.tuned).items():
        metric, side, k, _ = key
        fit = against_null(value, np.array([draw[key] for draw in draws]))
        row = SharedRow(*place, k, metric, side, value, null if draws else "", **asdict(fit))
        rows.append(replace(row, base_overlap_a=a.base_overlaps[key], base_overlap_b=b.base_overlaps[key]))
    return rows


def _independent_draws(a: Frames, b: Frames) -> list[tuple[LeadingSVD, LeadingSVD]]:
    """Draws of both nulls in pairs. Equal matrices have equal draws, so theirs are paired with each other's next."""
    if a.content != b.content:
        return list(zip(a.draws, b.draws, strict=True))
    return list(zip(a.draws, b.draws[1:] + b.draws[:1], strict=True)) if len(a.draws) > 1 else []


def _update_overlaps(place: Place, a: Frames, b: Frames) -> list[SharedRow]:
    most = min(a.update.S.numel(), b.update.S.numel())
    sides = {
        "left": cross_cosines(a.update.U[:, :most], b.update.U[:, :most]),
        "right": cross_cosines(a.update.Vh[:most].T, b.update.Vh[:most].T),
    }
    rows = []
    for (side, cosines), size in zip(sides.items(), place[-2:], strict=True):
        by_k = overlaps_by_k(cosines).tolist()
        for k in leading_grid(most):
            fit = against_haar(by_k[k - 1], size, k)
            rows.append(SharedRow(*place, k, "update_overlap", side, by_k[k - 1], "haar", **asdict(fit)))
    return rows
