"""Decompose the update of one matrix, `ΔW = W1 − W0`: the work of an extraction on one matrix, and where it is kept.

A task reads both matrices, decomposes their difference into certified triplets, or projects it on the base's
directions, and returns tensors with facts about them. `UpdateStore` keeps these until the adapter is written.
"""

import json
import sqlite3
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints import Matrix
from spectralbasis.checkpoints.matrices import dtype_name
from spectralbasis.comparison import metrics
from spectralbasis.comparison.measuring import (
    FLOAT32,
    FLOAT64,
    PROCESS_MEMORY,
    ROUNDED,
    UNCHANGED,
    krylov_memory,
    read_matrix,
    row_block_memory,
    working_memory,
)
from spectralbasis.databases import Kind, is_sealed, opened, seal
from spectralbasis.errors import InputError
from spectralbasis.linalg import LowRank, leading_svd, low_rank, singular_values
from spectralbasis.linalg.approximation import ENERGY_BLOCKS
from spectralbasis.linalg.row_blocks import (
    MatrixLike,
    RowSource,
    equal,
    equal_rounded,
    frobenius_norm,
    minus,
    plus,
    transposed_times,
)
from spectralbasis.linalg.svd import gram_pays, krylov_pays
from spectralbasis.records import Count, Finite, checked, parse_json
from spectralbasis.sizes import format_size
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner.config import SpectralConfig
from spectralbasis.tuner.preparation import Target, prepare

FIRST_RANK = 32
"""Rank that is tried first where a share of the energy is asked for."""
BASE_DIRECTIONS = 64
"""Leading directions of the base that settle most intruders without its full decomposition."""
_ROUNDING = 1e-12
"""Share of an energy within which a sum of squares counts as equal to it."""


class UpdateFacts(TypedDict):
    """What is known of one decomposed update.

    Attributes:
        rank: directions that were found.
        total: `‖ΔW‖_F²` as finetuning left it.
        removed: the part of it in intruder directions, which was left out.
        held: energy of what the adapter can hold: `Σ σ_i²`, or `‖U_kᵀ ΔW V_k‖_F²` of a spectral adapter.
        best: energy of the best approximation of this rank that was found.
        error_bound: largest share of the best possible energy that `best` misses.
        solver: what found it.
        intruders: how many were left out; -1 where nobody asked.
        intruders_left: how many the tuned matrix has after that; -1 where nobody asked.
        base_hash: of the base's matrix.
        probes: of the directions of a spectral adapter, see `MatrixRecord`.
    """

    rank: Count
    total: Finite
    removed: Finite
    held: Finite
    best: Finite
    error_bound: Finite
    solver: str
    intruders: int
    intruders_left: int
    base_hash: str
    probes: list[Finite]


class Update(NamedTuple):
    """The outcome of a task: content hash, facts and tensors; without facts where the store holds them, or a reason."""

    content: str = ""
    facts: UpdateFacts | None = None
    tensors: Mapping[str, Tensor] = MappingProxyType({})
    skipped: str = ""

    @property
    def unchanged(self) -> bool:
        """Whether finetuning left the matrix as it was."""
        return self.skipped == UNCHANGED or self.skipped.startswith(ROUNDED)


@dataclass(frozen=True)
class UpdateSettings:
    """What is extracted: the same settings on the same weights give the same tensors.

    Attributes:
        to: "lora" or "spectral".
        energy: share of each update's energy to reach; None takes the rank of the task.
        drop_intruders: leave out what the update does in intruder directions.
        tolerance: largest share of the best energy that may be missed; for the directions of a base, `basis_tolerance`.
        basis_tolerance: largest sine between computed and true leading subspaces of base and tuned matrices.
        device: where matrices are decomposed.
    """

    to: str
    energy: float | None
    drop_intruders: bool
    tolerance: float
    basis_tolerance: float = 1e-4
    device: str = "cpu"


@dataclass(frozen=True)
class UpdateTask:
    """One unit of work: a base matrix, its partner, and what is known already; see `comparison.distributing.Task`.

    Attributes:
        before: the base matrix.
        partners: {label: the finetuned matrix}.
        settings: what to extract.
        rank: directions to find, at most all; of a settled energy, the first guess.
        module: of the layer, as PEFT names it.
        record_name: name of the matrix in the record of a spectral adapter.
        base_source: how the base is named in messages.
        known: content hash of what the store holds of at least this rank, empty where it holds nothing.
        memory_budget: bytes that may be worked in. None: no limit.
    """

    before: Matrix
    partners: Mapping[str, Matrix]
    settings: UpdateSettings
    rank: int
    module: str
    record_name: str
    base_source: str
    known: str = ""
    memory_budget: int | None = None

    @property
    def whole_memory(self) -> int:
        """Bytes that the decomposition takes of a matrix that is in memory as a whole."""
        (m, n), k = self.before.shape, self.rank
        matrix, short = FLOAT32 * m * n, min(m, n)
        if self.settings.drop_intruders or self.settings.to == "spectral":
            return working_memory(m, n, k)
        gram = 2 * FLOAT64 * short**2 + 4 * FLOAT64 * k * (m + n)
        if krylov_pays(m, n, k):
            solver = max(gram, krylov_memory(short, k, ENERGY_BLOCKS))
        else:
            solver = gram if gram_pays(m, n, k) else FLOAT64 * (4 * m * n + 9 * short**2)
        return 3 * matrix + solver

    @property
    def in_row_blocks(self) -> bool:
        """Whether the matrix takes more than the budget when it is in memory as a whole."""
        return self.memory_budget is not None and self.whole_memory > self.memory_budget

    @property
    def worker_memory(self) -> int:
        """Bytes that a worker needs for the task, interpreter and all."""
        return PROCESS_MEMORY + min(self.whole_memory, self.memory_budget or self.whole_memory)

    def perform(self) -> Update:
        """Decompose the update; what cannot be decomposed is a reason, not an error."""
        try:
            return decompose(self)
        except ValueError as error:
            return Update(skipped=str(error))

    def failed(self, reason: str) -> Update:
        """The outcome where a worker could not do the work."""
        return Update(skipped=reason)


def decompose(task: UpdateTask) -> Update:
    """The update of one matrix as factors, or as coefficients on the base's directions.

    Raises:
        ValueError: nothing changed, a matrix cannot be read, or memory does not suffice.
    """
    _check_room(task)
    settings, by_rows = task.settings, task.in_row_blocks
    ((label, after),) = task.partners.items()
    W0 = read_matrix(task.before, settings.device, by_rows, task.base_source)
    W1 = read_matrix(after, settings.device, by_rows, label)
    _check_changed(W0, W1, task.before.dtype, after.dtype)
    base_hash = matrix_hash(W0)
    content = f"{base_hash}-{matrix_hash(W1)}"
    if task.known == content:
        return Update(content)
    delta = minus(W1, W0)
    total = float(frobenius_norm(delta).square())
    intruders, left = -1, -1
    if settings.drop_intruders:
        U = intruder_directions(W0, W1, settings.basis_tolerance)
        delta, intruders = without_directions(delta, U), U.shape[1]
        left = intruder_directions(W0, plus(W0, delta), settings.basis_tolerance).shape[1] if intruders else 0
    del W1
    kept = float(frobenius_norm(delta).square()) if intruders > 0 else total
    if kept <= _ROUNDING * total:
        raise ValueError("all of its update is in intruder directions, and --drop-intruders leaves these out")
    found = _best(delta, task)
    facts: UpdateFacts = {
        "rank": found.k,
        "total": total,
        "removed": max(total - kept, 0.0),
        "held": found.held,
        "best": found.held,
        "error_bound": found.error_bound,
        "solver": found.solver,
        "intruders": intruders,
        "intruders_left": left,
        "base_hash": base_hash,
        "probes": [],
    }
    if settings.to == "lora":
        tensors = {"U": found.U.float(), "S": found.S, "Vh": found.Vh.float()}
    else:
        C, probes = _projected(task, W0, delta, found.k, base_hash)
        facts["held"], facts["probes"], tensors = float(C.square().sum()), probes, {"C": C.float()}
    return Update(content, facts, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def _check_room(task: UpdateTask) -> None:
    """Raise ValueError where not even row blocks fit the budget, or where they do not do."""
    budget = task.memory_budget
    if budget is None or not task.in_row_blocks:
        return
    m, n = task.before.shape
    if task.settings.to == "spectral":
        needed, how = task.whole_memory, "projecting an update on the directions of its base"
    else:
        held = task.before.held_bytes + max(partner.held_bytes for partner in task.partners.values())
        needed = held + row_block_memory(m, n, task.rank, blocks_of_krylov=ENERGY_BLOCKS)
        how = "decomposing an update in row blocks"
    if needed > budget:
        raise ValueError(
            f"{how} takes {format_size(needed)} for {m}×{n} values, and the memory budget is {format_size(budget)}; "
            f"pass --memory-budget {format_size(needed, up=True)} or more"
        )


def _check_changed(W0: MatrixLike, W1: MatrixLike, before: torch.dtype, after: torch.dtype) -> None:
    """Raise ValueError where two matrices are equal, or equal but for the dtype that one of them was rounded to."""
    if equal(W0, W1):
        raise ValueError(UNCHANGED)
    if before != after and (equal_rounded(W0, W1, after) or equal_rounded(W1, W0, before)):
        raise ValueError(f"{ROUNDED} (stored as {dtype_name(before)} and {dtype_name(after)})")


def _best(delta: MatrixLike, task: UpdateTask) -> LowRank:
    """The best approximation of the task's rank, or of the smallest rank that reaches the share of energy."""
    m, n = delta.shape
    settings = task.settings
    if settings.energy is None:
        return low_rank(delta, min(task.rank, m, n), tolerance=settings.tolerance)
    rank = FIRST_RANK
    while krylov_pays(m, n, rank):
        found = low_rank(delta, rank, tolerance=settings.tolerance)
        if found.held >= (settings.energy - _ROUNDING) * found.total:
            return shortened(found, settings.energy)
        rank *= 2
    squares = singular_values(delta).square()
    rank = _enough(squares, settings.energy * float(squares.sum()))
    return shortened(low_rank(delta, rank, tolerance=settings.tolerance), settings.energy)


def shortened(found: LowRank, energy: float) -> LowRank:
    """The first triplets that hold this share of the whole energy; all where all of them hold less."""
    rank = _enough(found.S.square(), energy * found.total)
    return LowRank(found.U[:, :rank], found.S[:rank], found.Vh[:rank], found.total, found.error_bound, found.solver)


def _enough(squares: Tensor, energy: float) -> int:
    """How many squared singular values reach an energy, apart from rounding; 1 at least."""
    reached = squares.cumsum(0) >= (1 - _ROUNDING) * energy
    return int(reached.nonzero()[0]) + 1 if bool(reached.any()) else len(squares)


def intruder_directions(W0: MatrixLike, W1: MatrixLike, tolerance: float) -> Tensor:
    """Left singular vectors of W1 that are intruders by Shuttleworth et al. (2410.21228), (m, j) float64.

    Those among the ten leading ones whose largest `|cos|` to any left singular vector of W0 is below 0.5.
    """
    short = min(W0.shape)
    tuned = leading_svd(W1, min(metrics.INTRUDER_WINDOW, short), tolerance=tolerance)
    base = leading_svd(W0, max(1, min(BASE_DIRECTIONS, short // 2)), tolerance=tolerance)
    values = metrics.intruders(base, tuned, W0)
    found = [
        index
        for (metric, _, _, index), value in values.items()
        if metric == "max_cosine" and value < metrics.INTRUDER_COSINE
    ]
    return tuned.U[:, found].double()


def without_directions(delta: MatrixLike, U: Tensor) -> MatrixLike:
    """`(I − U Uᵀ) ΔW`: the update without what it writes into these left directions.

    The intruder triplet `σ u vᵀ` of W1 is no part of the update alone, since `uᵀ W1` is `uᵀ W0 + uᵀ ΔW`. Subtracting
    all of it would also take `uᵀ W0` from the base. The projection is the smallest change of the update (in the
    Frobenius norm) after which it does nothing in the direction u, so that `uᵀ (W0 + ΔW') = uᵀ W0`.

    Args:
        delta: (m, n).
        U: (m, j) float64, columns orthonormal.
    """
    if U.shape[1] == 0:
        return delta
    part = transposed_times(delta, U).T  # (j, n)
    if isinstance(delta, Tensor):
        return delta - (U @ part).to(delta.dtype)
    source = delta
    return RowSource(source.shape, lambda rows: source[rows].sub_((U[rows] @ part).float()), source.device)


def _projected(
    task: UpdateTask, W0: MatrixLike, delta: MatrixLike, k: int, base_hash: str
) -> tuple[Tensor, list[float]]:
    """`C = U_kᵀ ΔW V_k` on the directions that the tuner finds for the base, and their probes."""
    assert isinstance(W0, Tensor)  # of a row source the room was refused
    config = SpectralConfig(
        target_modules=[task.module], coefficients="core", leading=k, scaling="absolute", inference_mode=True
    )
    target = Target(task.record_name, task.record_name, W0, known_hash=base_hash)
    recorded, prepared = prepare(config, [target], W0.numel())
    U, V = (factor.double().to(W0.device) for factor in prepared[task.record_name].directions)
    return transposed_times(delta, U).T @ V, recorded.matrix(task.record_name).probes


STORE = Kind(
    application_id=0x53504558,
    version=1,
    tables=(
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE updates (module TEXT PRIMARY KEY, content TEXT NOT NULL, facts TEXT NOT NULL,"
        " tensors BLOB NOT NULL, seal TEXT NOT NULL)",
    ),
    writer="extraction",
    remedy="remove it, or choose another output folder",
)


@dataclass
class UpdateStore:
    """Decomposed updates by module, in a file beside the output until the adapter is complete.

    An update counts only for the weights that it was made from, and only with the seal of this user on this machine
    (`databases.seal`): what a bad disk has changed, or somebody else has stored, is decomposed again.

    Attributes:
        path: the file; None keeps everything in memory.
        settings: those of the extraction; a file that was made with others is refused with `resume`.
        resume: use what an earlier run left.
    """

    path: Path | None
    settings: Mapping[str, str]
    resume: bool
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        """Open the file for this process alone.

        Raises:
            InputError: see `databases.opened`; or `resume` meets results of other settings.
        """
        with ExitStack() as stack:
            self._connection = stack.enter_context(opened(self.path, STORE, fresh=not self.resume))
            known = dict(self._connection.execute("SELECT name, value FROM settings"))
            for name, value in self.settings.items():
                if known.get(name, value) != value:
                    raise InputError(
                        f"{self.path} was made with {name}={known[name]}, not {value}; resume with the same settings, "
                        "or leave out --resume to start again"
                    )
            with self._connection:
                self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", self.settings.items())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def known(self) -> dict[str, tuple[str, UpdateFacts]]:
        """Module → content hash and facts of what is stored and whole."""
        found = {}
        for (module,) in self._connection.execute("SELECT module FROM updates").fetchall():
            if (one := self._find(module)) is not None:
                found[module] = one[0], self._facts(module, one[1])
        return found

    def facts(self, module: str) -> UpdateFacts:
        """The facts of a stored update."""
        return self._facts(module, self._whole(module)[1])

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors of a stored update."""
        return load(self._whole(module)[2])

    def put(self, module: str, update: Update) -> None:
        """Keep an update, all of it or nothing.

        Raises:
            InputError: the file cannot be written.
        """
        facts, tensors = json.dumps(update.facts), save(dict(update.tensors))
        key = (module, update.content, facts)
        record = (*key, tensors, seal(json.dumps(dict(self.settings), sort_keys=True), *key, tensors))
        try:
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?)", record)
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"{self.path} cannot be written ({error}); what was decomposed before is kept: free some room, or make "
                "the folder writable, and continue with --resume"
            ) from error

    def _find(self, module: str) -> tuple[str, str, bytes] | None:
        query = "SELECT content, facts, tensors, seal FROM updates WHERE module = ?"
        settings = json.dumps(dict(self.settings), sort_keys=True)
        for content, facts, tensors, sealed in self._connection.execute(query, (module,)):
            if isinstance(tensors, bytes) and is_sealed(sealed, settings, module, content, facts, tensors):
                return content, facts, tensors
        return None

    def _whole(self, module: str) -> tuple[str, str, bytes]:
        found = self._find(module)
        if found is None:
            raise InputError(f"{self.path or 'the store'} lost the update of {module}; run the command again")
        return found

    def _facts(self, module: str, text: str) -> UpdateFacts:
        where = f"the update of {module} in {self.path}"
        return checked(parse_json(text, where), UpdateFacts, where)
