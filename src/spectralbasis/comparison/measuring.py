"""Measure one matrix of the base against its finetuned versions, whole or in row blocks if memory is short.

The base is decomposed once; each finetuned version is measured and compared with a null, in closed form or by draws.
The memory need is computed from the shape; it decides between whole and row blocks, and sets the number of workers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from spectralbasis.checkpoints import Matrix
from spectralbasis.checkpoints.matrices import dtype_name
from spectralbasis.comparison import metrics
from spectralbasis.comparison.coverage_moments import Key, Moments, UpdateSums
from spectralbasis.comparison.metrics import Measurements, Row, SharedRow, Window
from spectralbasis.comparison.nulls import COVERAGES, SCRAMBLED, Null, SingularVectors
from spectralbasis.comparison.rotations import Rotations, rotations
from spectralbasis.comparison.sharing import Frames, Pair, shared_rows, update_directions
from spectralbasis.comparison.statistics import NullFit, against_moments, against_null
from spectralbasis.errors import InputError
from spectralbasis.linalg import (
    Leading,
    LeadingSVD,
    gram_cosines,
    inner_products,
    leading_svd,
    leading_svd_and_values,
    resolve_leading,
    row_blocks,
    trailing_vectors,
)
from spectralbasis.linalg.row_blocks import MatrixLike, Rows, RowSource, equal, equal_rounded, minus, plus, row_slices
from spectralbasis.linalg.solvers import BLOCK
from spectralbasis.linalg.svd import gram_pays, krylov_pays, spectrum
from spectralbasis.linalg.thresholds import leading_by_shape
from spectralbasis.sizes import format_size
from spectralbasis.triplets import Triplets, compute_triplets_and_values, matrix_hash

UNCHANGED = "the same in both: finetuning did not change it"
ROUNDED = "the same in both apart from rounding"
USUAL_DRAWS = 5
"""Draws per matrix where the null has no closed form and no number is given."""
NullFits = dict[Key, tuple[NullFit, str]]
CLOSED, DRAWN = "closed form", "draws"
"""What a null's mean and standard deviation come from, as in the column `null_from`."""


@dataclass(frozen=True)
class Settings:
    """What is measured: the same settings on the same weights give the same rows.

    Attributes:
        leading: number of directions, fraction of min(m, n), "auto", "mp" or "gd".
        null: what each measurement is compared with; None for nothing.
        draws: draws of the null per matrix; None for its closed form where that holds, and `USUAL_DRAWS` elsewhere.
        seed: of the draws and of the bootstrap.
        tolerance: largest sine between computed and true leading subspaces.
        device: where matrices are decomposed.
        trailing: measure the trailing directions too, as many as leading ones.
    """

    leading: Leading = "auto"
    null: Null | None = SCRAMBLED
    draws: int | None = None
    seed: int = 0
    tolerance: float = 1e-4
    device: str = "cpu"
    trailing: bool = False

    def __post_init__(self) -> None:
        if self.null is not None and self.draws is not None and self.draws < 1:
            raise InputError(
                f"draws must be at least 1, got {self.draws}; pass 2 or more, None for the closed form where it holds, "
                "or null=None for no null"
            )

    @property
    def null_name(self) -> str:
        """Name of the null; empty where there is none."""
        return str(self.null or "")

    @property
    def drawn_in_base(self) -> bool:
        """Whether the null is drawn in all singular vectors of the base."""
        return self.null is not None and self.null.in_base

    @property
    def most_draws(self) -> int:
        """Draws of a matrix whose null has no closed form; 0 without a null."""
        return 0 if self.null is None else USUAL_DRAWS if self.draws is None else self.draws


@dataclass(frozen=True)
class MatrixTask:
    """One unit of work: a base matrix, its partner in each finetuned checkpoint, and what is known already.

    Attributes:
        before: the base matrix.
        partners: label of a finetuned checkpoint → its matrix.
        settings: what to measure.
        base_source: how the base is named in messages.
        known: label → content hash of the matrices whose rows the store holds.
        known_pairs: labels of two finetuned checkpoints → the same for what they share.
        memory_budget: bytes that may be worked in; a matrix that takes more is measured in row blocks. None: no limit.
    """

    before: Matrix
    partners: Mapping[str, Matrix]
    settings: Settings
    base_source: str
    known: Mapping[str, str]
    known_pairs: Mapping[Pair, str]
    memory_budget: int | None = None

    @property
    def whole_memory(self) -> int:
        """Bytes that measuring the matrix whole takes."""
        shape, settings = self.before.shape, self.settings
        return working_memory(
            *shape, expected_k(settings.leading, shape), trailing=settings.trailing, in_base=settings.drawn_in_base
        )

    @property
    def in_row_blocks(self) -> bool:
        """Whether the matrix takes more than the budget when it is measured whole."""
        return self.memory_budget is not None and self.whole_memory > self.memory_budget

    @property
    def worker_memory(self) -> int:
        """Bytes that a worker needs for the task, interpreter and all."""
        return PROCESS_MEMORY + min(self.whole_memory, self.memory_budget or self.whole_memory)

    def perform(self) -> "Outcome":
        """Measure the matrix; see `measure_matrix`."""
        return measure_matrix(self)

    def failed(self, reason: str) -> "Outcome":
        """The outcome where a worker could not measure it."""
        return Outcome(skipped=dict.fromkeys(self.partners, reason))


@dataclass
class Outcome:
    """What came of a task, by label or pair: the content hash with the rows (None: those of the store), or why not."""

    measured: dict[str, tuple[str, list[Row] | None]] = field(default_factory=dict)
    shared: dict[Pair, tuple[str, list[SharedRow] | None]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def measure_matrix(task: MatrixTask) -> Outcome:
    """Measure one base matrix against all its partners; what cannot be measured is a reason, not an error."""
    try:
        work = _Work(task)
    except ValueError as error:
        return Outcome(skipped=dict.fromkeys(task.partners, str(error)))
    for label in task.partners:
        try:
            work.measure(label)
        except ValueError as error:
            work.outcome.skipped[label] = str(error)
    work.share()
    return work.outcome


@dataclass(frozen=True)
class Base:
    """What is known of the base's matrix.

    Attributes:
        W: (m, n), float32, or a source of its rows.
        triplets: the leading ones.
        values: all singular values.
        norm: `‖W‖_F`.
        trailing: singular vectors of the smallest ones, where they were asked for.
    """

    W: MatrixLike
    triplets: Triplets
    values: Tensor
    norm: float
    trailing: Window | None

    @cached_property
    def vectors(self) -> SingularVectors:
        """All singular vectors of W, which has to be in memory."""
        assert isinstance(self.W, Tensor)
        return SingularVectors.of(self.W)


class _Work:
    """A task while it runs; the base is decomposed when the first partner needs it.

    Raises:
        ValueError: the base cannot be read, or there is not even room for row blocks.
    """

    def __init__(self, task: MatrixTask) -> None:
        self.task = task
        self.settings = task.settings
        self._check_room(expected_k(self.settings.leading, task.before.shape))
        self.W0 = self._read(task.before, task.base_source)
        self.base_hash = matrix_hash(self.W0)
        self.outcome = Outcome()
        self._hashes: dict[str, str] = {}
        self._frames: dict[str, Frames] = {}

    @cached_property
    def base(self) -> Base:
        k = resolve_leading(self.settings.leading, self.W0)
        self._check_room(k)
        found, values = compute_triplets_and_values(
            self.W0, k, tolerance=self.settings.tolerance, base_hash=self.base_hash
        )
        window = trailing_vectors(self.W0, k) if self.settings.trailing else None
        norm = float(row_blocks.frobenius_norm(self.W0))
        return Base(self.W0, found.to(self.settings.device), values, norm, window)

    def measure(self, label: str) -> None:
        """Measure one partner, unless the store holds its rows.

        Raises:
            ValueError: it cannot be measured.
        """
        W1 = self._tuned(label)
        if equal(self.W0, W1):
            raise ValueError(UNCHANGED)
        before, after = self.task.before.dtype, self.task.partners[label].dtype
        if before != after and (equal_rounded(self.W0, W1, after) or equal_rounded(W1, self.W0, before)):
            raise ValueError(
                f"{ROUNDED} (stored as {dtype_name(before)} and {dtype_name(after)}): no update to measure"
            )
        tuned_hash = matrix_hash(W1)
        content = f"{self.base_hash}-{tuned_hash}"
        known = self.task.known.get(label) == content
        self.outcome.measured[label] = content, None if known else self._rows(label, W1, tuned_hash)
        self._hashes[label] = tuned_hash

    def share(self) -> None:
        """Measure what the partners share, pair by pair, unless the store holds it."""
        missing = []
        for pair in combinations(self._hashes, 2):
            content = "-".join([self.base_hash, *(self._hashes[label] for label in pair)])
            self.outcome.shared[pair] = content, None
            if self.task.known_pairs.get(pair) != content:
                missing.append(pair)
        labels = list(dict.fromkeys(label for pair in missing for label in pair))
        for label in labels:
            if label not in self._frames:
                self._rows(label, self._tuned(label), self._hashes[label])
        update_cosines = gram_cosines(inner_products([partial(self._update, label) for label in labels]))
        for pair in missing:
            cosine = float(update_cosines[labels.index(pair[0]), labels.index(pair[1])])
            if not all(self._frames[label].rotations for label in pair):
                for label in pair:
                    self._draw(label)
            a, b = (self._frames[label] for label in pair)
            rows = shared_rows(pair, self.task.before, a, b, cosine, self.settings.null_name)
            self.outcome.shared[pair] = self.outcome.shared[pair][0], rows

    def _draw(self, label: str) -> None:
        """Keep the triplets under draws of the null for a partner that had none, as another one has no closed form."""
        frames, settings = self._frames[label], self.settings
        if settings.null is not None and not frames.draws:
            drawn = _Draws(self.base, self._update(label), settings, frames.content)
            self._frames[label] = replace(frames, draws=tuple(drawn.triplets()))

    def _check_room(self, k: int) -> None:
        """Raise ValueError where not even row blocks fit the budget."""
        budget, partners = self.task.memory_budget, self.task.partners.values()
        if budget is None or not self.task.in_row_blocks:
            return
        m, n = self.task.before.shape
        if self.settings.drawn_in_base:
            enough = format_size(self.task.whole_memory, up=True)
            raise ValueError(
                f"the null {self.settings.null_name} needs all singular vectors of the base, and so {m}×{n} values in "
                f"memory; pass --memory-budget {enough} or more, or another --null"
            )
        kept = len(partners) * (1 + self.settings.most_draws) if len(partners) > 1 else 0
        held = self.task.before.held_bytes + max(partner.held_bytes for partner in partners)
        needed = held + row_block_memory(m, n, k, kept=kept, trailing=self.settings.trailing)
        if needed > budget:
            why = f", {format_size(held)} of it for what cannot be read by rows from its file" if held else ""
            raise ValueError(
                f"measuring {m}×{n} values in row blocks takes {format_size(needed)}{why}, and the memory budget is "
                f"{format_size(budget)}; pass --memory-budget {format_size(needed, up=True)} or more"
            )

    def _tuned(self, label: str) -> MatrixLike:
        return self._read(self.task.partners[label], label)

    def _update(self, label: str) -> MatrixLike:
        return minus(self._tuned(label), self.W0)

    def _read(self, matrix: Matrix, where: str) -> MatrixLike:
        return read_matrix(matrix, self.settings.device, self.task.in_row_blocks, where)

    def _rows(self, label: str, W1: MatrixLike, tuned_hash: str) -> list[Row]:
        """The measurements of one pair as rows of the table, beside their null where they have one."""
        kept = len(self.task.partners) > 1
        values, fits, found = measure_pair(self.base, W1, self.settings, tuned_hash, kept)
        if found is not None:
            self._frames[label] = found
        matrix = self.task.before
        rows = []
        for (metric, side, k, index), value in values.items():
            row = Row(label, matrix.name, matrix.layer, matrix.kind, *matrix.shape, k, metric, side, index, value)
            if (metric, side, k, index) in fits:
                fit, source = fits[metric, side, k, index]
                row = replace(row, null=self.settings.null_name, **asdict(fit), null_from=source)
            rows.append(row)
        return rows


def read_matrix(matrix: Matrix, device: str, by_rows: bool, where: str) -> MatrixLike:
    """The matrix in float32 where the comparison works on it, or a source of its rows.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    W = _row_source(matrix, device) if by_rows else matrix.read().to(device=device, dtype=torch.float32)
    if isinstance(W, Tensor) and bool(torch.isfinite(W.sum())):  # one pass, where all is well
        return W
    bad = sum(int((~torch.isfinite(W[rows])).sum()) for rows in row_slices(W))
    if bad:
        size = matrix.shape[0] * matrix.shape[1]
        raise ValueError(f"{bad} of {size} values in {where} are NaN or infinite; this matrix has no spectrum")
    return W


def _row_source(matrix: Matrix, device: str) -> RowSource:
    numbers, stored = torch.arange(matrix.shape[0]), matrix.open_rows()

    def read(rows: Rows) -> Tensor:
        chosen = numbers[rows] if isinstance(rows, slice) else rows.cpu()
        return stored(chosen).to(device=device, dtype=torch.float32)

    return RowSource(matrix.shape, read, torch.device(device))


def measure_pair(
    base: Base, W1: MatrixLike, settings: Settings, tuned_hash: str, keep: bool
) -> tuple[Measurements, NullFits, Frames | None]:
    """All measurements of one pair, and how those that have a null compare with it.

    Args:
        base: the base matrix and what is known of it.
        W1: finetuned matrix, (m, n), float32, or a source of its rows, as the base is; not equal to it.
        settings: what to measure.
        tuned_hash: content hash of W1, which fixes the draws.
        keep: return also the frames that other finetuned checkpoints are compared with, else None.
    """
    triplets, k = base.triplets, base.triplets.k
    update = minus(W1, base.W)
    update_values = spectrum(update)
    tuned, tuned_values = leading_svd_and_values(W1, k, tolerance=settings.tolerance)
    norms = {
        "base": base.norm,
        "tuned": float(row_blocks.frobenius_norm(W1)),
        "update": float(row_blocks.frobenius_norm(update)),
    }
    values = (
        metrics.overlaps(triplets, tuned)
        | metrics.haar_overlaps(triplets.shape, k)
        | metrics.cosines(triplets, tuned)
        | metrics.intruders(triplets, tuned, base.W)
        | metrics.wedin_bounds(triplets, tuned, float(update_values[0]))
        | metrics.coverages(triplets, update)
        | metrics.spectra(triplets, tuned)
        | metrics.sizes({"base": base.values, "tuned": tuned_values, "update": update_values}, norms, k)
    )
    if base.trailing:
        values |= metrics.trailing(base.trailing, trailing_vectors(W1, k), update)
    error_bound = triplets.subspace_error_bound + tuned.subspace_error_bound
    moments: dict[Key, Moments] = {}
    rotated: Rotations = {}
    if settings.null is not None and settings.draws is None:
        moments, rotated = closed_form(
            settings.null, triplets, base.values, base.trailing, update, update_values, error_bound
        )
    fits: NullFits = {key: (against_moments(values[key], *one), CLOSED) for key, one in moments.items()}
    draws: list[LeadingSVD] = []
    nulled = _NULLED - (settings.null.keeps if settings.null is not None else set())
    if settings.null is not None and any(key not in moments for key in values if key[0] in nulled):
        drawn = _Draws(base, update, settings, tuned_hash)
        for key, found in drawn.values(leading=not rotated, kept=draws if keep else None).items():
            if key not in fits and key[0] in nulled:
                fits[key] = against_null(values[key], np.array(found)), DRAWN
    if not keep:
        return values, fits, None
    directions = update_directions(update, update_values, base.norm)
    overlaps = metrics.overlaps(triplets, tuned)
    return values, fits, Frames(tuned_hash, tuned, tuple(draws), rotated, directions, overlaps)


_NULLED = {"subspace_overlap", "trailing_overlap", "trailing_coverage", *COVERAGES}
"""The metrics that are compared with a null, save those that the null keeps."""


def closed_form(
    null: Null,
    leading: metrics.Factors,
    base_values: Tensor,
    window: Window | None,
    update: MatrixLike,
    update_values: Tensor,
    error_bound: float,
) -> tuple[dict[Key, Moments], Rotations]:
    """Moments of the measurements for which the null has a closed form, and the rotations where that holds, else none.

    Args:
        null: which null.
        leading: the base's leading triplets.
        base_values: all singular values of the base.
        window: the base's trailing window, where it is measured.
        update: ΔW, (m, n), not zero.
        update_values: its singular values.
        error_bound: sum of the bounds of the base's and the tuned leading subspaces.
    """
    values = update_values.double().cpu().numpy()
    moments: dict[Key, Moments] = {}
    if null.coverage is not None:
        sums = UpdateSums.of(update, values)
        moments |= metrics.coverage_moments(null.coverage, update, sums, leading.U, leading.Vh)
        if window is not None:
            within = metrics.coverage_moments(null.coverage, update, sums, window[0], window[1].T)
            core = {k: one for (metric, _, k, _), one in within.items() if metric == "coverage_core"}
            moments |= {("trailing_coverage", "both", k, -1): one for k, one in core.items()}
    if null.self_energy is None:
        return moments, {}
    grid, known = metrics.leading_grid(leading.S.numel()), base_values.double().cpu().numpy()
    energy = null.self_energy(values, (update.shape[0], update.shape[1]))
    rotated = rotations(known, energy, grid, error_bound) or {}
    for k, sides in rotated.items():
        for name, side in zip(("left", "right"), sides, strict=True):
            moments["subspace_overlap", name, k, -1] = side.overlap
    return moments, rotated


@dataclass(frozen=True)
class _Draws:
    """The draws of the null for one update, each made when it is asked for."""

    base: Base
    update: MatrixLike
    settings: Settings
    tuned_hash: str

    def values(self, leading: bool, kept: list[LeadingSVD] | None) -> dict[Key, list[float]]:
        """What is measured under each draw; the leading triplets only where asked, then added to `kept`."""
        found: dict[Key, list[float]] = defaultdict(list)
        base = self.base
        for chance in self._updates():
            measured = metrics.coverages(base.triplets, chance)
            if leading:
                moved = self._moved(chance)
                measured |= metrics.overlaps(base.triplets, moved)
                if kept is not None:
                    kept.append(moved)
            if base.trailing:
                window = trailing_vectors(plus(base.W, chance), base.triplets.k)
                measured |= metrics.trailing(base.trailing, window, chance)
            for key, value in measured.items():
                found[key].append(value)
        return found

    def triplets(self) -> Iterator[LeadingSVD]:
        """The leading triplets of the base under each draw."""
        return map(self._moved, self._updates())

    def _updates(self) -> Iterator[MatrixLike]:
        settings = self.settings
        assert settings.null is not None
        return settings.null.draws(
            self.update,
            settings.most_draws,
            settings.seed,
            self.base.triplets.base_hash,
            self.tuned_hash,
            lambda: self.base.vectors,
        )

    def _moved(self, chance: MatrixLike) -> LeadingSVD:
        return leading_svd(plus(self.base.W, chance), self.base.triplets.k, tolerance=self.settings.tolerance)


FLOAT32, FLOAT64 = 4, 8
PROCESS_MEMORY = 450_000_000
"""Bytes of an interpreter with torch and this package, before it has read anything."""
USUAL_LEADING = 64
"""k assumed when it depends on the spectrum."""
_BLOCKS = 24
"""Blocks of rows in float32 that a process grows by: those of base, tuned, update and draw, the widened one, and what
lies free between them, of which allocators leave more or less (20 were seen)."""


def expected_k(leading: Leading, shape: tuple[int, int]) -> int:
    """How many directions a setting means for a matrix of shape (m, n), as far as the shape tells."""
    known = leading_by_shape(leading, shape)
    return min(USUAL_LEADING, *shape) if known is None else known


def working_memory(m: int, n: int, k: int, *, trailing: bool = False, in_base: bool = False) -> int:
    """Bytes that measuring one (m, n) matrix against one partner takes at most, beside the interpreter's own.

    Seven float32 matrices are held while a null is drawn: base, tuned, update, the last draw's update and sum, and two
    on the way to the next. A decomposition runs beside five of them.

    Args:
        m: rows.
        n: columns.
        k: leading directions.
        trailing: whether the trailing directions are measured too, which takes all eigenvectors.
        in_base: whether the null is drawn in all singular vectors of the base, which are held with parts of the update
            in them.
    """
    matrix, short = FLOAT32 * m * n, min(m, n)
    # In float64: the matrix, LAPACK's copy, both factors and their workspace. A full decomposition is the last resort
    # of every solver, and settles doubtful intruders.
    dense = FLOAT64 * (4 * m * n + 9 * short**2)
    gram = 2 * FLOAT64 * short**2 + 4 * FLOAT64 * k * (m + n)
    if trailing:
        solver = max(dense, 3 * FLOAT64 * short**2)
    elif krylov_pays(m, n, k):
        solver = max(gram, krylov_memory(short, k))
    else:
        solver = gram if gram_pays(m, n, k) else dense
    held = FLOAT32 * short * (m + n) + 4 * matrix if in_base else 0
    return max(7 * matrix, 5 * matrix + solver, 3 * matrix + dense) + held


def row_block_memory(
    m: int, n: int, k: int, *, kept: int = 0, trailing: bool = False, blocks_of_krylov: int = 20
) -> int:
    """Bytes that measuring one (m, n) matrix in row blocks takes at most, beside what cannot be read by rows.

    The Gram matrix of the smaller side is the largest part; that of a wide matrix comes from blocks of its own size,
    and all its eigenvectors take several more.

    Args:
        m: rows.
        n: columns.
        k: leading directions.
        kept: triplets that are kept until all partners of the matrix are measured.
        trailing: whether the trailing directions are measured too.
        blocks_of_krylov: see `linalg.solvers.leading_right_space`.
    """
    short = min(m, n)
    dimensions = _krylov_dimensions(short, k, blocks_of_krylov)
    krylov = FLOAT32 * dimensions * short + 3 * FLOAT64 * dimensions**2
    gram = FLOAT64 * short**2 * (7 if trailing else 2 if m < n else 1)
    blocks = _BLOCKS * FLOAT32 * min(m * n, row_blocks.BLOCK_ENTRIES)
    return blocks + max(gram, krylov) + (6 * FLOAT64 + kept * FLOAT32) * k * (m + n)


def krylov_memory(short: int, k: int, blocks: int = 20) -> int:
    """Bytes of the largest Krylov space for k directions of a matrix whose smaller side is `short`."""
    dimensions = _krylov_dimensions(short, k, blocks)
    return FLOAT32 * dimensions * short + FLOAT64 * dimensions**2


def _krylov_dimensions(short: int, k: int, blocks: int = 20) -> int:
    return min(short // 2, 6 * k + blocks * BLOCK) + BLOCK
