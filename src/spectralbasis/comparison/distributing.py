"""Send matrices to an executor for measurement, in as many processes as memory allows.

A task reaches another process as a `Parcel`, which holds either the places of its matrices in files or their numbers.
"""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralbasis.checkpoints.checkpoint import Checkpoint
from spectralbasis.checkpoints.matrices import Cut, Matrix
from spectralbasis.comparison.measuring import MatrixTask, Outcome, measure_matrix
from spectralbasis.errors import InputError
from spectralbasis.execution import Crew, Executor, Failure
from spectralbasis.printable import printable
from spectralbasis.sizes import available_memory, format_size


def measured(tasks: Iterable[MatrixTask], executor: Executor) -> Iterator[tuple[MatrixTask, Outcome]]:
    """Each task with its outcome, in the order in which they finish; a task is packed when there is room for it.

    A task is sent with the places of its matrices. Once a worker does not see the files, all are sent with numbers.
    """
    waiting, again = iter(tasks), deque[MatrixTask]()
    pack: Callable[[MatrixTask], Parcel] = with_places
    crew: Crew[str] = Crew(executor)
    under_way: dict[str, MatrixTask] = {}
    while True:
        while crew.has_room and (task := again.popleft() if again else next(waiting, None)):
            under_way[task.before.name] = task
            if executor.travels:
                crew.start(task.before.name, measure_parcel, pack(task), memory=task.worker_memory)
            else:
                crew.start(task.before.name, measure_matrix, task)
        if not under_way:
            return
        for name, found in crew.finished():
            task = under_way.pop(name)
            if found is None:
                pack = with_contents
                again.append(task)
            elif isinstance(found, Failure):
                yield task, Outcome(skipped=dict.fromkeys(task.partners, found.reason))
            else:
                yield task, found


@dataclass(frozen=True)
class Parcel:
    """A task that can travel.

    Attributes:
        task: the task; its matrices are small enough to be sent, or carry their numbers.
        evidence: those that are to be read from a file, each with what tells this file from others of its name.
    """

    task: MatrixTask
    evidence: tuple[tuple[Matrix, str], ...]


def measure_parcel(parcel: Parcel) -> Outcome | None:
    """The outcome of `measure_matrix`, or None where the worker does not see the files that the sender meant."""
    if any(_evidence(matrix) != expected for matrix, expected in parcel.evidence):
        return None
    return measure_matrix(parcel.task)


def with_places(task: MatrixTask) -> Parcel:
    """A parcel whose matrices are read where it arrives, except those that no file holds as they are."""
    evidence: list[tuple[Matrix, str]] = []

    def place(matrix: Matrix) -> Matrix:
        there = by_place(matrix)
        if there is None:
            return by_content(matrix)
        evidence.append((there, _evidence(there)))
        return there

    return Parcel(_with_matrices(task, place), tuple(evidence))


def with_contents(task: MatrixTask) -> Parcel:
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


def _with_matrices(task: MatrixTask, change: Callable[[Matrix], Matrix]) -> MatrixTask:
    partners = {label: change(matrix) for label, matrix in task.partners.items()}
    return replace(task, before=change(task.before), partners=partners)


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


def free_memory(device: str) -> int:
    """Bytes that are free where matrices are decomposed."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return available_memory()


def announce_row_blocks(tasks: Iterable[MatrixTask]) -> None:
    """Log which matrices are measured in row blocks, if any."""
    large = [task for task in tasks if task.in_row_blocks]
    if large:
        logging.getLogger(__name__).warning(
            "%s takes more than the memory budget of %s, so it is read in row blocks, several times%s",
            printable(large[0].before.name),
            format_size(large[0].memory_budget or 0),
            f"; the same applies to {len(large) - 1} more" if len(large) > 1 else "",
        )


def affordable_workers(wanted: int, tasks: Iterable[MatrixTask]) -> int:
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
