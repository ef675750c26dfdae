"""One matrix of the base and its finetuned partners: decomposed once, measured, held against draws of a null."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

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
from spectralbasis.linalg import Leading, leading_svd, resolve_leading
from spectralbasis.triplets import Triplets, compute_triplets, matrix_hash

UNCHANGED = "the same in both: finetuning did not touch it"
NullValues = dict[Key, list[float]]


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


@dataclass(frozen=True)
class MatrixTask:
    """One unit of work: a base matrix, its partner in each finetuned checkpoint, and what is known already.

    Attributes:
        before: the base matrix.
        partners: label of a finetuned checkpoint → its matrix.
        settings: what to measure.
        base_source: how the base is named in messages.
        known: label → content hash of the pair whose rows the store holds.
    """

    before: Matrix
    partners: Mapping[str, Matrix]
    settings: Settings
    base_source: str
    known: Mapping[str, str]


@dataclass
class Outcome:
    """What came of a task, by label: the content hash with the rows (None: those of the store), or why not."""

    measured: dict[str, tuple[str, list[Row] | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure_matrix(task: MatrixTask) -> Outcome:
    """Measure one base matrix against all its partners; what cannot be measured is a reason, not an error."""
    outcome = Outcome()
    try:
        W0 = _read(task.before, task.settings, task.base_source)
    except ValueError as error:
        outcome.skipped = dict.fromkeys(task.partners, str(error))
        return outcome
    base = _Base(W0, task.settings)
    for label, after in task.partners.items():
        try:
            W1 = _read(after, task.settings, label)
            if torch.equal(W0, W1):
                raise ValueError(UNCHANGED)
            tuned_hash = matrix_hash(W1)
            content = f"{base.hash}-{tuned_hash}"
            known = task.known.get(label) == content
            outcome.measured[label] = content, None if known else base.rows(label, task.before, W1, tuned_hash)
        except ValueError as error:
            outcome.skipped[label] = str(error)
    return outcome


class _Base:
    """A base matrix, decomposed when the first partner needs it."""

    def __init__(self, W0: Tensor, settings: Settings) -> None:
        self.W0 = W0
        self.settings = settings
        self.hash = matrix_hash(W0)
        self._triplets: Triplets | None = None

    @property
    def triplets(self) -> Triplets:
        if self._triplets is None:
            k = resolve_leading(self.settings.leading, self.W0)
            found = compute_triplets(self.W0, k, tolerance=self.settings.tolerance)
            self._triplets = found.to(self.settings.device)
        return self._triplets

    def rows(self, label: str, matrix: Matrix, W1: Tensor, tuned_hash: str) -> list[Row]:
        """The measurements of one pair as rows of the table, beside their null where they have one."""
        values, null_values = measure_pair(self.W0, W1, self.triplets, self.settings, tuned_hash)
        m, n = matrix.shape
        rows = []
        for key, value in values.items():
            metric, side, k, index = key
            row = Row(label, matrix.name, matrix.layer, matrix.kind, m, n, k, metric, side, index, value)
            if key in null_values:
                fit = against_null(value, np.array(null_values[key]))
                row = replace(row, null=self.settings.null or "", **asdict(fit))
            rows.append(row)
        return rows


def measure_pair(
    W0: Tensor, W1: Tensor, base: Triplets, settings: Settings, tuned_hash: str
) -> tuple[Measurements, NullValues]:
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
    ranks, update_norm = metrics.sizes(W0, W1, base.k)
    values = (
        metrics.overlaps(base, tuned)
        | metrics.haar_overlaps(base.shape, base.k)
        | metrics.cosines(base, tuned)
        | metrics.intruders(base, tuned, W0)
        | metrics.wedin_bounds(base, tuned, update_norm)
        | metrics.coverages(base, update)
        | metrics.spectra(base, tuned)
        | ranks
    )
    return values, _null_values(W0, update, base, settings, tuned_hash)


def _null_values(W0: Tensor, update: Tensor, base: Triplets, settings: Settings, tuned_hash: str) -> NullValues:
    values: NullValues = defaultdict(list)
    for draw in range(settings.draws if settings.null else 0):
        generator = draw_generator(settings.seed, base.base_hash, tuned_hash, draw)
        chance = NULLS[str(settings.null)](update, generator)
        moved = leading_svd(W0 + chance, base.k, tolerance=settings.tolerance)
        for key, value in (metrics.overlaps(base, moved) | metrics.coverages(base, chance)).items():
            values[key].append(value)
    return values


def _read(matrix: Matrix, settings: Settings, where: str) -> Tensor:
    """The matrix in float32 where the comparison works on it.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    W = matrix.read().to(device=settings.device, dtype=torch.float32)
    bad = int((~torch.isfinite(W)).sum())
    if bad:
        raise ValueError(f"{bad} of {W.numel()} values in {where} are NaN or infinite; this matrix has no spectrum")
    return W
