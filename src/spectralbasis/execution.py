"""Where work runs: in this process, in local processes side by side, or on a Ray cluster."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch

from spectralbasis.errors import InputError

START_METHOD = "spawn"
"""New interpreters: forking a process whose BLAS has started threads can hang it."""

Task = TypeVar("Task")
Result = TypeVar("Result")


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16; where it must emulate, that is slower than float32, up to tenfold."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
    context = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Workers(Executor):
    """Runs calls in this process, in local processes side by side, or on a Ray cluster; a context manager.

    Calls and results must be picklable where there are several processes. Each local process uses its share of the
    cores.

    Args:
        jobs: how many calls run at once; 1 runs them here, when they are submitted.
        ray: address of a Ray cluster, "auto" for the one that this machine belongs to, "local" for one made here.

    Raises:
        InputError: `jobs` is below 1, or there is no Ray to use.
    """

    def __init__(self, jobs: int = 1, ray: str | None = None) -> None:
        if jobs < 1:
            raise InputError(f"jobs={jobs} cannot work; pass 1 or more")
        self.jobs = jobs
        self.ray = None if ray is None else _start_ray(ray)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        """Start a call; a worker that dies shows as `BrokenProcessPool` in its future, after which `restart` helps."""
        if self.ray is not None:
            # One attempt here as elsewhere: whoever submits knows how often a call may be tried.
            future: Future[Any] = self.ray.remote(max_retries=0)(fn).remote(*args, **kwargs).future()
            return future
        if self.jobs == 1:
            return _call(fn, *args, **kwargs)
        if self._pool is None:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            context = multiprocessing.get_context(START_METHOD)
            self._pool = ProcessPoolExecutor(
                self.jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
            )
        return self._pool.submit(fn, *args, **kwargs)

    def restart(self) -> None:
        """Let new processes take the place of those that died."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)


def _call(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    try:
        future.set_result(fn(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


def _start_ray(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs the package ray; pip install 'spectralbasis[ray]'") from error
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address!r} ({error}); start one, or pass --ray local") from error
    return ray
