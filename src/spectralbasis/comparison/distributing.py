"""Send work on matrices to an executor, in as many processes as memory allows.

A `Task` works on a matrix of the base and its partners: a comparison measures them, an extraction decomposes their
difference. A task reaches another process as a `Parcel`, which holds either the places of its matrices in files or
their numbers.
"""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrices import Cut, Matrix
from spectralbasis.errors import InputError
from spectralbasis.execution import Crew, Executor, Failure, open_executor
from spectralbasis.printable import printable
from spectralbasis.sizes import available_memory, format_size


class Task(Protocol):
    """Work on one matrix of the base and its partners, as a dataclass that `replace` takes.

    Attributes:
        before: the base matrix.
        partners: label of a finetuned checkpoint → its matrix.
        memory_budget: bytes that may be worked in; None: no limit.
    """

    @property
    def before(self) -> Matrix: ...

    @property
    def partners(self) -> Mapping[str, Matrix]: ...

    @property
    def memory_budget(self) -> int | None: ...

    @property
    def in_row_blocks(self) -> bool:
        """Whether the matrix takes more than the budget as a whole."""

    @property
    def worker_memory(self) -> int:
        """Bytes that a worker needs for the task, interpreter and all."""

    def perform(self) -> Any:
        """Do the work; what cannot be done is part of the outcome."""

    def failed(self, reason: str) -> Any:
        """The outcome where a worker could not do the work."""


AnyTask = TypeVar("AnyTask", bound=Task)


@contextmanager
def outcomes(
    tasks: Sequence[AnyTask], *, workers: int, ray: str | None, budget: int | None, device: str
) -> Iterator[Iterator[tuple[AnyTask, Any]]]:
    """Run tasks in this process, in local processes or on a Ray cluster; each with its outcome, as they finish.

    Fewer processes than wanted start where memory is short. Without a budget, local processes share the memory that is
    free. A log says which matrices are read in row blocks.

    Args:
        tasks: each of another matrix.
        workers: local processes.
        ray: address of a Ray cluster in their place.
        budget: bytes that each process may work in.
        device: where matrices are decomposed.

    Raises:
        InputError: `workers` is out of its range, or no cluster answers.
    """
    if ray is None and workers > 1:
        workers = affordable_workers(workers, tasks)
    if ray is None and budget is None:
        budget = free_memory(device) // max(workers, 1)
        tasks = [replace(task, memory_budget=budget) for task in tasks]  # type: ignore[type-var]
    announce_row_blocks(tasks)
    with open_executor(workers, ray, threads=1, gpu=device.startswith("cuda")) as executor:
        yield performed(tasks, executor)


def performed(tasks: Iterable[AnyTask], executor: Executor) -> Iterator[tuple[AnyTask, Any]]:
    """Each task with its outcome, in the order in which they finish; a task is packed when there is room for it.

    A task is sent with the places of its matrices. Once a worker does not see the files, all are sent with numbers.
    """
    waiting, again = iter(tasks), deque[AnyTask]()
    pack: Callable[[AnyTask], Parcel] = with_places
    crew: Crew[str] = Crew(executor)
    under_way: dict[str, AnyTask] = {}
    while True:
        while crew.has_room and (task := again.popleft() if again else next(waiting, None)):
            under_way[task.before.name] = task
            if executor.travels:
                crew.start(task.before.name, perform_parcel, pack(task), memory=task.worker_memory)
            else:
                crew.start(task.before.name, perform_task, task)
        if not under_way:
            return
        for name, found in crew.finished():
            task = under_way.pop(name)
            if found is None:
                pack = with_contents
                again.append(task)
            elif isinstance(found, Failure):
                yield task, task.failed(found.reason)
            else:
                yield task, found


def perform_task(task: Task) -> Any:
    """The outcome of a task, here."""
    return task.perform()


@dataclass(frozen=True)
class Parcel:
    """A task that can travel.

    Attributes:
        task: the task; its matrices are small enough to be sent, or carry their numbers.
        evidence: those that are to be read from a file, each with what tells this file from others of its name.
    """

    task: Task
    evidence: tuple[tuple[Matrix, str], ...]


def perform_parcel(parcel: Parcel) -> Any:
    """The outcome of the task, or None where the worker does not see the files that the sender meant."""
    if any(_evidence(matrix) != expected for matrix, expected in parcel.evidence):
        return None
    return perform_task(parcel.task)


def with_places(task: Task) -> Parcel:
    """A parcel whose matrices are read where it arrives, except those that no file holds as they are."""
    evidence: list[tuple[Matrix, str]] = []

    def place(matrix: Matrix) -> Matrix:
        there = by_place(matrix)
        if there is None:
            return by_content(matrix)
        evidence.append((there, _evidence(there)))
        return there

    return Parcel(_with_matrices(task, place), tuple(evidence))


def with_contents(task: Task) -> Parcel:
    """A parcel that needs no file."""
    return Parcel(_with_matrices(task, by_content), ())


def by_place(matrix: Matrix) -> Matrix | None:
    """The matrix as something small that reads it from its file; None where it is in memory or computed when read."""
    alone = matrix.checkpoint.alone(matrix.cut.tensor)
    return None if alone is None else replace(matrix, checkpoint=alone)


def by_content(matrix: Matrix) -> Matrix:
    """The matrix with its numbers; an error of reading it is raised where the receiver reads it."""
    try:
        sent = SentTensor(matrix.read())
    except ValueError as error:
        sent = SentTensor(torch.empty(matrix.shape), str(error))
    return replace(matrix, checkpoint=sent, cut=Cut(sent.source))


def _with_matrices(task: Task, change: Callable[[Matrix], Matrix]) -> Task:
    partners = {label: change(matrix) for label, matrix in task.partners.items()}
    return replace(task, before=change(task.before), partners=partners)  # type: ignore[type-var]


def _evidence(matrix: Matrix) -> str:
    """What tells the matrix's file from others of its name; empty where there is no file."""
    try:
        return matrix.checkpoint.evidence(matrix.cut.tensor)
    except ValueError:
        return ""


class SentTensor(Checkpoint):
    """One tensor that travels as an array of bytes, which other processes can map instead of copying.

    Args:
        W: any shape, on the CPU.
        error: why it could not be read; `read` raises it.
    """

    def __init__(self, W: Tensor, error: str = "") -> None:
        self.source = "sent"
        self.config = {}
        self._shape = tuple(W.shape)
        self._dtype = W.dtype
        self._error = error
        self._bytes = None if error else W.contiguous().reshape(-1).view(torch.uint8).numpy()

    def names(self) -> tuple[str, ...]:
        return (self.source,)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str) -> Tensor:
        if self._bytes is None:
            raise InputError(self._error)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mapped array is read-only, as every tensor read is to us
            return torch.from_numpy(self._bytes).view(self._dtype).reshape(self._shape)


def check_device(device: str) -> None:
    """Raise InputError where this machine has no such device."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={device!r} cannot be used here ({error}); pass device='cpu'") from error


def free_memory(device: str) -> int:
    """Bytes that are free where matrices are decomposed."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return available_memory()


def announce_row_blocks(tasks: Iterable[Task]) -> None:
    """Log which matrices are read in row blocks, if any."""
    large = [task for task in tasks if task.in_row_blocks]
    if large:
        logging.getLogger(__name__).warning(
            "%s takes more than the memory budget of %s, so it is read in row blocks, several times%s",
            printable(large[0].before.name),
            format_size(large[0].memory_budget or 0),
            f"; the same applies to {len(large) - 1} more" if len(large) > 1 else "",
        )


def affordable_workers(wanted: int, tasks: Iterable[Task]) -> int:
    """How many processes fit into memory when each holds one of the largest matrices; 1 at least.

    A warning is logged where that is fewer than wanted.
    """
    needs = [task.worker_memory for task in tasks]
    wanted = min(wanted, len(needs))
    if wanted <= 1:
        return 1
    available, need = available_memory(), max(needs)
    affordable = max(1, min(wanted, available // need))
    if affordable < wanted:
        logging.getLogger(__name__).warning(
            "using %d processes instead of %d: %.1f GB are free, and each process needs %.1f GB for the largest matrix",
            affordable,
            wanted,
            available / 1e9,
            need / 1e9,
        )
    return affordable
