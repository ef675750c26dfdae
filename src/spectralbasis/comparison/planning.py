"""What a comparison will take, before it is made: from the shapes of its matrices and a short look at this machine."""

import heapq
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spectralbasis.checkpoints import Matrix, logical_matrices, open_checkpoint
from spectralbasis.comparison.costs import (
    KINDS_OF_BYTES,
    PROCESS_MEMORY,
    USUAL_LEADING,
    Clock,
    Rates,
    Work,
    calibrate,
    expected_k,
    operations,
    total,
    working_memory,
)
from spectralbasis.comparison.measuring import MatrixTask, Settings, measure_matrix
from spectralbasis.comparison.pairing import Pairing, open_pairs
from spectralbasis.errors import InputError
from spectralbasis.execution import RayCluster, cores
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.linalg.svd import gram_pays, krylov_pays
from spectralbasis.sizes import available_memory, parse_size

SMALL = (96, 80)
"""Shape of the matrix that is measured to see what a matrix takes whatever its size."""


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
        """What decomposes the base under a draw of the null."""
        m, n = self.shape
        return "krylov" if krylov_pays(m, n, self.k) else "gram" if gram_pays(m, n, self.k) else "dense"

    def seconds(self, rates: Rates) -> dict[str, float]:
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
    """Matrices of one shape, held against so many partners; `stored_bytes` are those of one with its partners."""
    k = expected_k(settings.leading, shape)
    draws = settings.draws if settings.null else 0
    steps = operations(shape, k, draws=draws, stored_bytes=stored_bytes, partners=partners, trailing=settings.trailing)
    memory = working_memory(*shape, k, trailing=settings.trailing)
    return Group(shape, count, k, steps, PROCESS_MEMORY + min(memory, memory_budget or memory))


def seconds_on(groups: Iterable[Group], rates: Rates, slots: int) -> float:
    """How long all matrices take on so many workers of this speed that share one disk, the largest ones first."""
    groups = list(groups)
    times = [sum(group.seconds(rates).values()) for group in groups for _ in range(group.count)]
    free = [0.0] * min(slots, max(len(times), 1))
    for one in sorted(times, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    read = sum(group.count * total(group.steps)["read"] for group in groups)
    return max(max(free), read / rates.rate("read", 1))


def plan_comparison(
    base: Any,
    tuned: Sequence[Any],
    *,
    leading: Leading = "auto",
    null: str | None = "scrambled",
    draws: int = 5,
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
        base: as of `compare`, as are the others.
        tuned: one or more finetuned checkpoints.
        leading: number of leading directions, or the rule that sets it.
        null: of the draws; None for none.
        draws: draws of the null per matrix.
        include: glob patterns of matrix names to measure.
        exclude: glob patterns of matrix names to leave out.
        partial: take an adapter also where the base lacks some of what it adapts.
        trailing: measure the trailing directions too.
        workers: local processes; None takes one for each core.
        memory_budget: what each process may work in.
        ray: address of a Ray cluster, whose cores are taken to be as fast as this machine's.
        clock: what time is taken by.

    Returns:
        `base`, `tuned`, `skipped` (how many); `matrices` by shape: `shape`, `count`, `k`, `solver`, `seconds` of one in
        a worker, `memory_bytes`; `steps`: `operations` and `seconds` of all matrices in one worker; `read_bytes`;
        `operations`; `memory_bytes` of a worker at most; `executors`: `name`, `slots`, `seconds`.

    Raises:
        InputError: as of `compare`, or no cluster answers.
    """
    settings = Settings(parse_leading(leading), null, draws, trailing=trailing)
    budget = None if memory_budget is None else parse_size(memory_budget)
    pairing = open_pairs(base, tuned, include, exclude, partial=partial)
    if not pairing.bases:
        raise InputError(f"no weight of {pairing.base.source} can be read, so there is nothing to plan")
    groups = group_by_shape(pairing, settings, budget)
    threads, file = torch.get_num_threads(), _any_file(pairing)
    one = calibrate_with_overhead(file, settings, threads=1, clock=clock)
    every = one if threads == 1 else calibrate_with_overhead(file, settings, threads=threads, clock=clock)
    largest = max(group.memory for group in groups)
    wanted = workers or cores()
    processes = max(1, min(wanted, available_memory() // largest))
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


def describe_work(groups: Sequence[Group], rates: Rates) -> dict[str, Any]:
    """What groups of matrices consist of, and how long one worker of this speed takes for each part."""
    steps: dict[str, Counter[str]] = {}
    seconds: Counter[str] = Counter()
    for group in groups:
        for step, work in group.steps.items():
            steps[step] = steps.get(step, Work()) + Work({kind: group.count * n for kind, n in work.items()})
        seconds.update({step: group.count * one for step, one in group.seconds(rates).items()})
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
            step: {"operations": _operations(steps.get(step, Work())), "seconds": spent}
            for step, spent in seconds.items()
        },
        "read_bytes": total(steps)["read"],
        "operations": _operations(total(steps)),
    }


def group_by_shape(pairing: Pairing, settings: Settings, memory_budget: int | None) -> list[Group]:
    """The matrices of a comparison by shape, stored size and number of partners, the largest first."""
    counts: Counter[tuple[tuple[int, int], int, int]] = Counter()
    for name, matrix in pairing.bases.items():
        partners = pairing.partners[name].values()
        counts[matrix.shape, _stored(matrix) + sum(map(_stored, partners)), len(partners)] += 1
    groups = [
        make_group(shape, count, settings, stored_bytes=stored, partners=partners, memory_budget=memory_budget)
        for (shape, stored, partners), count in counts.items()
    ]
    return sorted(groups, key=lambda group: math.prod(group.shape), reverse=True)


def calibrate_with_overhead(
    file: Path | None, settings: Settings, *, threads: int, clock: Clock = time.perf_counter
) -> Rates:
    """`calibrate`, and what a matrix of these settings takes whatever its size."""
    rates = calibrate(file, threads, clock=clock)
    W = torch.randn(SMALL, generator=torch.Generator().manual_seed(0))
    before, after = (
        logical_matrices(open_checkpoint({"small.weight": one}))[0]["small"] for one in (W, W + 0.1 * W.flip(0))
    )
    small = replace(settings, leading=min(USUAL_LEADING, expected_k(settings.leading, SMALL)))
    seconds = []
    for _ in range(3):
        started = clock()
        measure_matrix(MatrixTask(before, {"": after}, small, "", {}, {}))
        seconds.append(clock() - started)
    return replace(rates, overhead=statistics.median(seconds))


def _operations(work: Work) -> int:
    return sum(amount for kind, amount in work.items() if kind not in KINDS_OF_BYTES)


def _stored(matrix: Matrix) -> int:
    return math.prod(matrix.shape) * matrix.checkpoint.dtype(matrix.cut.tensor).itemsize


def _any_file(pairing: Pairing) -> Path | None:
    """A file that weights are read from; None where they are in memory."""
    matrix = next(iter(pairing.bases.values()))
    return getattr(matrix.checkpoint.alone(matrix.cut.tensor), "path", None)
