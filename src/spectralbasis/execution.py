"""Where work runs: in this process, or in local processes side by side."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from spectralbasis.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")


def stream(work: Callable[[Task], Result], tasks: Sequence[Task], workers: int = 1) -> Iterator[tuple[Task, Result]]:
    """Yield each task with its result, as they come in; a task runs in one process, with one BLAS thread.

    Args:
        work: a function of one task that a process can import.
        tasks: what to work on; they travel to the processes when there are several.
        workers: number of processes; 1 works here, with all threads, in order.

    Raises:
        InputError: `workers` is below 1.
    """
    if workers < 1:
        raise InputError(f"workers={workers} cannot work; pass 1 or more")
    if workers == 1:
        for task in tasks:
            yield task, work(task)
        return
    # Forking a process whose BLAS has started threads can hang it, so new interpreters are spawned.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
