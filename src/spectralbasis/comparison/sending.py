"""A task on its way to another process: with the places of its matrices, or with their numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from spectralbasis.checkpoints.matrix import Matrix
from spectralbasis.checkpoints.sent import by_content, by_place
from spectralbasis.comparison.measuring import MatrixTask, Outcome, measure_matrix


@dataclass(frozen=True)
class Parcel:
    """A task that can travel.

    Attributes:
        task: the task; its matrices are small enough to be sent, or carry their numbers.
        evidence: those that are to be read from a file, each with what tells this file from others of its name.
    """

    task: MatrixTask
    evidence: tuple[tuple[Matrix, str], ...]


def with_places(task: MatrixTask) -> Parcel:
    """A parcel whose matrices are read where it arrives, but for those that no file holds as they are."""
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


def measure_parcel(parcel: Parcel) -> Outcome | None:
    """What `measure_matrix` finds, or None where the files that the sender meant are not to be seen."""
    if any(_evidence(matrix) != expected for matrix, expected in parcel.evidence):
        return None
    return measure_matrix(parcel.task)


def _with_matrices(task: MatrixTask, change: Callable[[Matrix], Matrix]) -> MatrixTask:
    partners = {label: change(matrix) for label, matrix in task.partners.items()}
    return replace(task, before=change(task.before), partners=partners)


def _evidence(matrix: Matrix) -> str:
    """Empty where there is no file."""
    try:
        return matrix.checkpoint.evidence(matrix.cut.tensor)
    except ValueError:
        return ""
