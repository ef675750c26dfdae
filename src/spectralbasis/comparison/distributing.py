"""Has tasks measured by an executor, a few at a time."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch

from spectralbasis.comparison.measuring import MatrixTask, Outcome, measure_matrix
from spectralbasis.comparison.memory import PROCESS_MEMORY, expected_k, working_memory
from spectralbasis.comparison.sending import Parcel, measure_parcel, with_contents, with_places
from spectralbasis.execution import Crew, Executor, Failure
from spectralbasis.printable import printable
from spectralbasis.sizes import available_memory, format_size

Tasks = Iterable[MatrixTask]


def measured(tasks: Tasks, executor: Executor) -> Iterator[tuple[MatrixTask, Outcome]]:
    """Each task with what came of it, as they come; a task is packed when there is room for it.

    A task goes out with the places of its matrices. Once a worker has not seen the files, all go out with numbers.
    """
    waiting, again = iter(tasks), deque[MatrixTask]()
    pack: Callable[[MatrixTask], Parcel] = with_places
    crew: Crew[str] = Crew(executor)
    under_way: dict[str, MatrixTask] = {}
    while True:
        while crew.has_room and (task := again.popleft() if again else next(waiting, None)):
            under_way[task.before.name] = task
            if executor.travels:
                crew.start(task.before.name, measure_parcel, pack(task), memory=task_memory(task))
            else:
                crew.start(task.before.name, measure_matrix, task)
        if not under_way:
            return
        for name, found in crew.finished():
            task = under_way.pop(name)
            if found is None:
                pack = with_contents
                again.append(task)
            else:
                yield task, _outcome(task, found)


def task_memory(task: MatrixTask) -> int:
    """Bytes that the worker of a task needs, interpreter and all."""
    k = expected_k(task.settings.leading, task.before.shape)
    whole = working_memory(*task.before.shape, k, trailing=task.settings.trailing)
    return PROCESS_MEMORY + (whole if task.memory_budget is None else min(whole, task.memory_budget))


def free_memory(device: str) -> int:
    """Bytes that are free where matrices are decomposed."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return available_memory()


def announce_row_blocks(tasks: Tasks) -> None:
    """Say on the log which matrices are measured in row blocks, if any."""
    large = [task for task in tasks if task.in_row_blocks]
    if large:
        logging.getLogger(__name__).warning(
            "%s takes more than the memory budget of %s, so it is read in row blocks, again and again%s",
            printable(large[0].before.name),
            format_size(large[0].memory_budget or 0),
            f"; so are {len(large) - 1} more" if len(large) > 1 else "",
        )


def affordable_workers(wanted: int, tasks: Tasks) -> int:
    """How many processes fit into memory beside each other when each holds one of the largest matrices; 1 at least.

    Says so on the log where that is fewer than wanted.
    """
    needs = [task_memory(task) for task in tasks]
    wanted = min(wanted, len(needs))
    if wanted <= 1:
        return 1
    available, need = available_memory(), max(needs)
    affordable = max(1, min(wanted, available // need))
    if affordable < wanted:
        logging.getLogger(__name__).warning(
            "%d processes in place of %d: %.1f GB are free, and the largest matrix takes %.1f GB in each",
            affordable,
            wanted,
            available / 1e9,
            need / 1e9,
        )
    return affordable


def _outcome(task: MatrixTask, found: Outcome | Failure) -> Outcome:
    return Outcome(skipped=dict.fromkeys(task.partners, found.reason)) if isinstance(found, Failure) else found
