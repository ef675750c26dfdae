"""Estimate the work, memory and time of a comparison from the shapes of its matrices.

The work on a matrix is counted by kind, and each kind is timed on this machine for a few seconds.
"""

import heapq
import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from spectralbasis.checkpoints import Matrix, logical_matrices, open_checkpoint
from spectralbasis.comparison.measuring import (
    FLOAT32,
    PROCESS_MEMORY,
    USUAL_LEADING,
    MatrixTask,
    Settings,
    expected_k,
    measure_matrix,
    working_memory,
)
from spectralbasis.comparison.nulls import Null, parse_null, scrambled
from spectralbasis.comparison.pairing import Pairing, open_pairs
from spectralbasis.comparison.sharing import UPDATE_DIRECTIONS
from spectralbasis.errors import InputError
from spectralbasis.execution import RayCluster, cores
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.linalg.row_blocks import back_and_forth, gram, times_and_back
from spectralbasis.linalg.solvers import BLOCK, eigenvalues
from spectralbasis.linalg.svd import GUARD, VALUES_SIDE, gram_pays, krylov_pays
from spectralbasis.sizes import available_memory, parse_size
from spectralbasis.triplets import matrix_hash

Clock = Callable[[], float]


def plan_comparison(
    base: Any,
    tuned: Sequence[Any],
    *,
    leading: Leading = "auto",
    null: str | Null | None = "scrambled",
    draws: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    partial: bool = False,
    trailing: bool = False,
    workers: int | None = None,
    memory_budget: str | int | None = None,
    ray: str | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """What `compare` with these arguments will take; only headers are read, and this machine is measured for seconds.

    Args:
        base: the pretrained checkpoint, as in `compare`; so are the other arguments.
        tuned: one or more finetuned checkpoints.
        leading: number of leading directions, or the rule that sets it.
        null: what each measurement is compared with; None for no null.
        draws: draws of the null per matrix; None assumes that its closed form holds in all matrices.
        include: glob patterns of matrix names to measure.
        exclude: glob patterns of matrix names to leave out.
        partial: accept an adapter also where the base lacks some of what it adapts.
        trailing: measure the trailing directions too.
        workers: local processes; None is one for each core.
        memory_budget: what each process may work in.
        ray: address of a Ray cluster; its cores are assumed to be as fast as this machine's.
        clock: gives the time in seconds.

    Returns:
        `base`, `tuned`, `skipped` (how many); `matrices` by shape: `shape`, `count`, `k`, `solver`, `seconds` of one in
        a worker, `memory_bytes`; `steps`: `operations` and `seconds` of all matrices in one worker; `read_bytes`;
        `operations`; `memory_bytes` of a worker at most; `executors`: `name`, `slots`, `seconds`.

    Raises:
        InputError: as of `compare`, or no cluster answers.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> W0 = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        >>> base, tuned = {"layer.0.dense.weight": W0}, {"layer.0.dense.weight": W0 + 0.1}
        >>> plan = sb.plan_comparison(base, [tuned], leading=4, draws=2, workers=1)
        >>> [(one["shape"], one["count"], one["k"]) for one in plan["matrices"]]
        [([24, 16], 1, 4)]
        >>> [sorted(one) for one in plan["executors"]][0]
        ['name', 'seconds', 'slots']
    """
    settings = Settings(parse_leading(leading), parse_null(null), draws, trailing=trailing)
    budget = None if memory_budget is None else parse_size(memory_budget)
    pairing = open_pairs(base, tuned, include, exclude, partial=partial)
    if not pairing.bases:
        raise InputError(f"no weight of {pairing.base.source} can be read, so there is nothing to plan")
    groups = group_by_shape(pairing, settings, budget)
    matrix = next(iter(pairing.bases.values()))
    file = getattr(matrix.checkpoint.alone(matrix.cut.tensor), "path", None)  # None where weights are in memory
    threads = torch.get_num_threads()
    one = calibrate(file, settings, threads=1, clock=clock)
    every = one if threads == 1 else calibrate(file, settings, threads=threads, clock=clock)
    largest = max(group.memory for group in groups)
    processes = max(1, min(workers or cores(), available_memory() // largest))
    places = [(f"this process, {threads} thread(s)", 1, every), (f"{processes} processes", processes, one)]
    if ray is not None:
        with RayCluster(ray) as cluster:
            places.append((f"Ray at {ray}, {cluster.workers} cores", cluster.workers, one))
    return {
        "base": pairing.base.source,
        "tuned": list(pairing.tuned),
        "skipped": len(pairing.skipped),
        **describe_work(groups, one),
        "memory_bytes": largest,
        "executors": [
            {"name": name, "slots": slots, "seconds": seconds_on(groups, rates, slots)} for name, slots, rates in places
        ],
    }


Work = Counter[str]
"""Amounts by kind of work: bytes of `KINDS_OF_BYTES`, floating-point operations of the others."""
KINDS_OF_BYTES = ("read", "pass")
KINDS = {
    "read": "bytes from disk",
    "pass": "bytes of float32 matrices that are hashed, permuted, added",
    "product64": "products of whole matrices, as Gram matrices; in float32 they count half",
    "thin64": "products with k columns in float64",
    "thin32": "products with 16 columns in float32",
    "tridiagonal": "reductions of Gram matrices to tridiagonal form; in float32 they count half",
    "dense": "full singular value decompositions in float64",
}
PASSES_OF_A_PAIR = 16
"""How often a float32 matrix is passed through for each partner: finite values, equality, hash, difference, norms, and
the sums of the null in closed form."""
PASSES_OF_A_DRAW = 8
"""The same for each draw of a null: rows, columns, signs, the sum, its check and norm."""


def operations(
    shape: tuple[int, int],
    k: int,
    *,
    draws: int,
    stored_bytes: int,
    partners: int = 1,
    trailing: bool = False,
    in_base: bool = False,
) -> dict[str, Work]:
    """The work of measuring one matrix of the base against its partners, by step.

    Spectra are assumed to fall: in a flat one Krylov spaces grow to about twice the dimension, and where most tuned
    directions are new, intruders take one full decomposition more.

    Args:
        shape: (m, n).
        k: leading directions.
        draws: draws of the null for each partner; 0 for none.
        stored_bytes: of the matrix in the base and in its partners.
        partners: finetuned checkpoints that it is compared with.
        trailing: whether the trailing directions are measured too.
        in_base: whether the null is drawn in all singular vectors of the base.
    """
    m, n = shape
    short, long, matrix = min(m, n), max(m, n), FLOAT32 * m * n
    coverages = Work({"thin64": 4 * m * n * k})
    base = _triplets(m, n, k, all_values=True)
    update = _all_values(m, n) + coverages + Work({"pass": PASSES_OF_A_PAIR * matrix})
    draw = _triplets(m, n, k) + coverages + Work({"pass": PASSES_OF_A_DRAW * matrix})
    if in_base:  # to and from the vectors of both sides; in float32
        draw = draw + Work({"product64": 4 * m * n * short})
    steps = {
        "read": Work({"read": stored_bytes, "pass": 2 * matrix * (1 + partners)}),
        "base": base,
        "tuned": _times(partners, base),
        "update": _times(partners, update),
        "null": _times(partners * draws, draw),
    }
    if in_base and draws:
        steps["null"] = steps["null"] + Work({"dense": 6 * long * short**2 + 20 * short**3})
    if trailing:  # all eigenvectors of a Gram matrix, by divide and conquer
        vectors = {"product64": 2 * long * short**2 + 4 * short**3, "tridiagonal": 4 * short**3 // 3}
        steps["trailing"] = _times(1 + partners * (1 + draws), Work(vectors) + coverages)
    if partners > 1:
        pairs = partners * (partners + 1) // 2
        reading = Work({"read": pairs * stored_bytes // (1 + partners), "pass": 6 * pairs * matrix})
        steps["sharing"] = _times(partners, _triplets(m, n, min(UPDATE_DIRECTIONS, m, n))) + reading
    return {step: work for step, work in steps.items() if work}


def total(steps: Mapping[str, Work]) -> Work:
    """All steps together."""
    return sum(steps.values(), Work())


def _times(count: int, work: Work) -> Work:
    return Work({kind: count * amount for kind, amount in work.items() if count})


def _triplets(m: int, n: int, k: int, *, all_values: bool = False) -> Work:
    """`linalg.leading_svd`, or `leading_svd_and_values`, by the solver that it chooses."""
    short, long = min(m, n), max(m, n)
    if krylov_pays(m, n, k) and (not all_values or short >= VALUES_SIDE):
        dimensions = 3 * k + 2 * BLOCK  # where a falling spectrum lets block Lanczos end
        orthogonalisation = 2 * short * dimensions**2  # a pass of space @ (space.T @ W) over a growing space
        product = 2 * short * short if all_values else 4 * m * n  # with the Gram matrix, where it is formed anyway
        thin32 = product * dimensions + orthogonalisation + 2 * short * dimensions * (k + BLOCK)
        thin64 = _ritz(m, n, k + BLOCK) + 4 * dimensions**2 * k
        krylov = Work({"thin32": thin32, "tridiagonal": 4 * dimensions**3 // 3, "thin64": thin64})
        return krylov + _all_values(m, n) if all_values else krylov
    if gram_pays(m, n, k):
        return _all_values(m, n) + Work({"thin64": _ritz(m, n, k + GUARD), "thin32": 4 * short**2 * (k + GUARD)})
    # A full decomposition (Golub & Van Loan, R-SVD): reduction, iteration and both factors.
    return _all_values(m, n) + Work({"dense": 6 * long * short**2 + 20 * short**3})


def _all_values(m: int, n: int) -> Work:
    """`linalg.svd.spectrum`: a Gram matrix in float32, and its reduction."""
    short, long = min(m, n), max(m, n)
    return Work({"product64": long * short**2, "tridiagonal": 2 * short**3 // 3})


def _ritz(m: int, n: int, p: int) -> int:
    """Rayleigh–Ritz in float64 on p columns: products there and back, their Gram matrices, their turning."""
    return 4 * m * n * p + 4 * (m + n) * p**2


@dataclass(frozen=True)
class Group:
    """Matrices of one shape.

    Attributes:
        shape: (m, n).
        count: how many there are.
        k: leading directions.
        steps: what measuring one of them consists of.
        memory: bytes that its worker needs, interpreter and all.
    """

    shape: tuple[int, int]
    count: int
    k: int
    steps: Mapping[str, Work]
    memory: int

    @property
    def solver(self) -> str:
        """The solver that decomposes the base under a draw of the null, where it is drawn."""
        m, n = self.shape
        return "krylov" if krylov_pays(m, n, self.k) else "gram" if gram_pays(m, n, self.k) else "dense"

    def seconds(self, rates: "Rates") -> dict[str, float]:
        """How long each step takes for one matrix; the overhead is a step of its own."""
        side = min(self.shape)
        found = {step: rates.seconds(work, side) for step, work in self.steps.items()}
        return found | {"overhead": rates.overhead}


def make_group(
    shape: tuple[int, int],
    count: int,
    settings: Settings,
    *,
    stored_bytes: int,
    partners: int = 1,
    memory_budget: int | None = None,
) -> Group:
    """Matrices of one shape with so many partners each; `stored_bytes` are those of one with its partners."""
    k = expected_k(settings.leading, shape)
    null = settings.null
    drawn = settings.draws is not None or (null is not None and null.self_energy is None) or settings.trailing
    draws = settings.most_draws if drawn else 0
    in_base, trailing = settings.drawn_in_base, settings.trailing
    steps = operations(
        shape, k, draws=draws, stored_bytes=stored_bytes, partners=partners, trailing=trailing, in_base=in_base
    )
    memory = working_memory(*shape, k, trailing=trailing, in_base=in_base)
    return Group(shape, count, k, steps, PROCESS_MEMORY + min(memory, memory_budget or memory))


def group_by_shape(pairing: Pairing, settings: Settings, memory_budget: int | None) -> list[Group]:
    """The matrices of a comparison by shape, stored size and number of partners, the largest first."""

    def stored(matrix: Matrix) -> int:
        return math.prod(matrix.shape) * matrix.checkpoint.dtype(matrix.cut.tensor).itemsize

    counts: Counter[tuple[tuple[int, int], int, int]] = Counter()
    for name, matrix in pairing.bases.items():
        partners = pairing.partners[name].values()
        counts[matrix.shape, stored(matrix) + sum(map(stored, partners)), len(partners)] += 1
    groups = [
        make_group(shape, count, settings, stored_bytes=stored_bytes, partners=partners, memory_budget=memory_budget)
        for (shape, stored_bytes, partners), count in counts.items()
    ]
    return sorted(groups, key=lambda group: math.prod(group.shape), reverse=True)


def describe_work(groups: Sequence[Group], rates: "Rates") -> dict[str, Any]:
    """The work on groups of matrices, and how long one worker of this speed takes for each part."""
    steps: dict[str, Work] = {}
    seconds: Counter[str] = Counter()
    for group in groups:
        for step, work in group.steps.items():
            steps[step] = steps.get(step, Work()) + _times(group.count, work)
        seconds.update({step: group.count * one for step, one in group.seconds(rates).items()})

    def floating_point(work: Work) -> int:
        return sum(amount for kind, amount in work.items() if kind not in KINDS_OF_BYTES)

    return {
        "matrices": [
            {
                "shape": list(group.shape),
                "count": group.count,
                "k": group.k,
                "solver": group.solver,
                "seconds": sum(group.seconds(rates).values()),
                "memory_bytes": group.memory,
            }
            for group in groups
        ],
        "steps": {
            step: {"operations": floating_point(steps.get(step, Work())), "seconds": spent}
            for step, spent in seconds.items()
        },
        "read_bytes": total(steps)["read"],
        "operations": floating_point(total(steps)),
    }


def seconds_on(groups: Iterable[Group], rates: "Rates", slots: int) -> float:
    """How long all matrices take on so many workers of this speed that share one disk, the largest ones first."""
    groups = list(groups)
    times = [sum(group.seconds(rates).values()) for group in groups for _ in range(group.count)]
    free = [0.0] * min(slots, max(len(times), 1))
    for one in sorted(times, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    read = sum(group.count * total(group.steps)["read"] for group in groups)
    return max(max(free), read / rates.rate("read", 1))


@dataclass(frozen=True)
class Rates:
    """Amounts per second by kind of work.

    Attributes:
        by_side: kind → (smaller side of the matrix, amount per second), by ascending side; between two sides the rate
            is interpolated on logarithms, beyond them it is that of the last.
        overhead: seconds that each matrix takes whatever its size.
    """

    by_side: Mapping[str, tuple[tuple[int, float], ...]]
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


REPEATS = 5
COLUMNS = 64
PASSES = 8
"""Passes through a float32 matrix when it is scrambled (4), hashed (2), added (1) and compared (1)."""
PIECE = 64_000_000
"""Bytes that are read to see how fast a disk is."""
SMALL = (96, 80)
"""Shape of the matrix that is measured to see what a matrix takes whatever its size."""


def calibrate(file: Path | None, settings: Settings, *, threads: int, clock: Clock = time.perf_counter) -> Rates:
    """Measure this machine; takes a few seconds.

    Args:
        file: read to see how fast its disk is; None where no weights are read.
        settings: of the comparison, with which a small matrix is measured.
        threads: number of threads to compute with.
        clock: gives the time in seconds.
    """

    def seconds(work: Callable[[], object], repeats: int) -> float:
        spent = []
        for _ in range(repeats):
            started = clock()
            work()
            spent.append(clock() - started)
        return max(statistics.median(spent), 1e-9)

    def rates(
        work: Callable[[Tensor], object], amount: Callable[[int], float], *sides: int
    ) -> tuple[tuple[int, float], ...]:
        found = []
        for side in sides:
            A = _matrix(side, side)
            work(A)  # the first call is slower
            found.append((side, amount(side) / seconds(lambda A=A: work(A), REPEATS)))  # type: ignore[misc]
        return tuple(found)

    def pass_through(A: Tensor) -> None:
        drawn = scrambled(A, torch.Generator().manual_seed(0))
        matrix_hash(drawn)
        torch.equal(A + drawn, A)

    with _threads(threads):
        by_side = {
            "read": ((1, math.inf if file is None else read_rate(file, clock)),),
            "pass": rates(pass_through, lambda n: PASSES * FLOAT32 * n**2, 512, 2048),
            "product64": rates(gram, lambda n: 2 * n**3, 256, 768, 1536),
            "thin64": rates(
                lambda A: times_and_back(A, _matrix(A.shape[1], COLUMNS).double()),
                lambda n: 4 * n**2 * COLUMNS,
                *(384, 1024, 2048),
            ),
            "thin32": rates(
                lambda A: back_and_forth(A, _matrix(A.shape[1], BLOCK), 1.0),
                lambda n: 4 * n**2 * BLOCK,
                512,
                1024,
                2048,
            ),
            "tridiagonal": rates(lambda A: eigenvalues(A.double()), lambda n: 4 * n**3 / 3, 256, 512, 1024),
            "dense": rates(lambda A: torch.linalg.svd(A.double(), full_matrices=False), lambda n: 26 * n**3, 128, 384),
        }
        W = _matrix(*SMALL)
        before, after = (
            logical_matrices(open_checkpoint({"small.weight": one}))[0]["small"] for one in (W, W + 0.1 * W.flip(0))
        )
        small = replace(settings, leading=min(USUAL_LEADING, expected_k(settings.leading, SMALL)))
        return Rates(by_side, seconds(lambda: measure_matrix(MatrixTask(before, {"": after}, small, "", {}, {})), 3))


def read_rate(file: Path, clock: Clock = time.perf_counter) -> float:
    """Bytes per second that a file is read with; it is dropped from the system's cache first, where that can be."""
    with file.open("rb", buffering=0) as opened:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(opened.fileno(), 0, PIECE, os.POSIX_FADV_DONTNEED)
        started = clock()
        count = len(opened.read(PIECE))
        return count / max(clock() - started, 1e-9)


def _matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


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
