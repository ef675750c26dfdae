"""Run work in this process, in local processes in parallel, or on a Ray cluster.

`open_executor` chooses the place. An `Executor` runs single calls there. A `Crew` keeps it busy with a limited number
of calls, and repeats a call if its worker dies.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from pickle import PicklingError
from typing import Any, Generic, Self, TypeVar, cast

import torch
from threadpoolctl import threadpool_limits

from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.printable import shortened

ATTEMPTS = 3
"""How often a call is tried whose worker dies; the last time with nothing beside it."""
START_METHOD = "spawn"
"""New interpreters: forking a process whose BLAS has started threads can hang it."""
MOST_WORKERS = 1024
"""Processes on one machine; each takes hundreds of megabytes before it works."""
AHEAD = 2
"""Calls under way on a cluster for each that can run: the next one is there when a worker is free."""
SECONDS_TO_ANSWER = 10
LOCAL = "local"
_NO_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory")
_READY = "ready"
_SAFE_PATH = "PYTHONSAFEPATH"
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
Key = TypeVar("Key", bound=Hashable)


def open_executor(
    workers: int = 1, ray: str | None = None, *, threads: int | None = None, gpu: bool = False
) -> "Executor":
    """This process, local processes or a Ray cluster.

    Args:
        workers: local processes; 1 works in this one.
        ray: address of a Ray cluster, "auto" or "local", in place of local processes.
        threads: threads that each local process computes with; None gives each its share of the cores.
        gpu: whether each call on the cluster takes a GPU.

    Raises:
        InputError: `workers` is below 1 or above `MOST_WORKERS`, or there is no Ray to use.
    """
    if not 1 <= workers <= MOST_WORKERS:
        raise InputError(f"workers must be from 1 to {MOST_WORKERS}, got {shortened(workers, 40)}")
    if ray is not None:
        return RayCluster(ray, gpu=gpu)
    return Here() if workers == 1 else Processes(workers, threads or max(1, cores() // workers))


@dataclass(frozen=True)
class Call:
    """A function and its arguments, picklable where they travel.

    Attributes:
        work: a function that a worker can import.
        arguments: what it is called with.
        memory: bytes that it takes at most, as far as known.
    """

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int = 0


@dataclass(frozen=True)
class Failure:
    """In place of a result: what went wrong; text alone, since an exception might not travel."""

    reason: str


@dataclass(frozen=True)
class Death(Failure):
    """The worker died, or had too little memory: another attempt may succeed."""


class Executor(ABC):
    """Runs calls; a context manager that ends what is still under way when it is left."""

    travels: bool = True
    """Whether calls run in other processes, so that arguments and results are copied."""

    @property
    def workers(self) -> int:
        """How many calls can run at once."""
        return 1

    @property
    def slots(self) -> int:
        """How many calls may be under way: few more than can run at once, so that memory stays bounded."""
        return self.workers

    @abstractmethod
    def start(self, call: Call) -> Hashable:
        """Start a call and return a ticket for it."""

    @abstractmethod
    def finished(self) -> list[tuple[Hashable, Any]]:
        """Wait until a call ends; tickets of those that have, each with its result or with a `Failure`."""

    @abstractmethod
    def close(self) -> None:
        """End what is under way, without waiting for its result."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Here(Executor):
    """Runs each call when it is started, one after the other, with all threads."""

    travels = False

    def __init__(self) -> None:
        self._done: list[tuple[Hashable, Any]] = []
        self._started = 0

    def start(self, call: Call) -> int:
        self._started += 1
        self._done.append((self._started, perform(call.work, call.arguments)))
        return self._started

    def finished(self) -> list[tuple[Hashable, Any]]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done.clear()


class Processes(Executor):
    """Runs each call in one of some processes that this one starts; one that dies is known by its call, and replaced.

    Args:
        count: number of processes.
        threads: threads that each computes with.

    Raises:
        InputError: a process cannot start (raised while waiting for a result).
    """

    def __init__(self, count: int, threads: int = 1) -> None:
        self._count = count
        self._threads = threads
        self._idle = [_Worker(threads) for _ in range(count)]
        self._busy: dict[Connection, _Worker] = {}

    @property
    def workers(self) -> int:
        return self._count

    def start(self, call: Call) -> Hashable:
        worker = self._idle.pop() if self._idle else _Worker(self._threads)
        self._busy[worker.connection] = worker
        with suppress(BrokenPipeError, ConnectionResetError):  # it died idle: the end of its pipe tells in `finished`
            worker.connection.send((call.work, call.arguments))
        return worker.take_ticket()

    def finished(self) -> list[tuple[Hashable, Any]]:
        done: list[tuple[Hashable, Any]] = []
        while self._busy and not done:
            for connection in cast(list[Connection], wait(list(self._busy))):
                worker = self._busy[connection]
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    del self._busy[connection]
                    done.append((worker.ticket, worker.cause_of_death()))
                    continue
                if message == _READY:
                    worker.ready = True
                    continue
                del self._busy[connection]
                self._idle.append(worker)
                done.append((worker.ticket, message[0]))
        return done

    def close(self) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.kill()
        self._idle, self._busy = [], {}


class _Worker:
    """A process, our end of the pipe to it, and the ticket of its latest call."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context(START_METHOD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, threads))  # type: ignore[attr-defined]
        with _clean_start():
            self.process.start()
        theirs.close()
        self.ready = False
        self._calls = 0

    @property
    def ticket(self) -> tuple[int | None, int]:
        return self.process.pid, self._calls

    def take_ticket(self) -> tuple[int | None, int]:
        self._calls += 1
        return self.ticket

    def cause_of_death(self) -> Death:
        """What a dead process died of.

        Raises:
            InputError: it failed before it could take any work, as any other would.
        """
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if code > 0 and not self.ready:
            raise InputError(
                f"a worker process cannot start (exit code {code}; its error is printed above); a script that asks for "
                "several processes must do so under `if __name__ == '__main__':`"
            )
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Death(f"its process {how}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, threads: int) -> None:
    """What a process does: take a call, send its result, until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(_READY)
        while True:
            result = perform(*connection.recv())
            try:
                connection.send((result,))
            except (PicklingError, AttributeError, TypeError, ValueError) as error:
                connection.send((Failure(f"its result cannot be sent ({error})"),))


@contextmanager
def _clean_start() -> Iterator[None]:
    """Start processes that import no module of the working folder and that ignore Ctrl-C from the beginning.

    A new interpreter would look into the working folder even for `multiprocessing`. It then takes over the path of this
    one, so that a script's own modules are found in workers as they are here. Ctrl-C while it imports would be answered
    with a traceback; one that is pressed meanwhile reaches this process afterwards.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    mask = None
    try:
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            resource_tracker.ensure_running()  # which unblocks them when it is started
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


class RayCluster(Executor):
    """Runs each call on one core, or one GPU, of a Ray cluster; nodes may come and go.

    Args:
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for one made here.
        gpu: whether each call takes a GPU.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str, *, gpu: bool = False) -> None:
        self._ray, self._ours = connect_ray(address)
        self._kind = "GPU" if gpu else "CPU"
        self._options: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1 if gpu else None, "max_retries": 0}
        self._remote = self._ray.remote(_perform_on_one_thread)
        self._under_way: list[Any] = []

    @property
    def workers(self) -> int:
        return max(1, int(self._ray.cluster_resources().get(self._kind, 0)))

    @property
    def slots(self) -> int:
        return AHEAD * self.workers

    def start(self, call: Call) -> Hashable:
        # A call that asked for more memory than the largest node offers would wait for ever.
        nodes = (node["Resources"].get("memory", 0) for node in self._ray.nodes() if node["Alive"])
        memory = min(call.memory, int(max(nodes, default=0))) or None
        remote = self._remote.options(**self._options, memory=memory)
        reference: Hashable = remote.remote(call.work, call.arguments)
        self._under_way.append(reference)
        return reference

    def finished(self) -> list[tuple[Hashable, Any]]:
        if not self._under_way:
            return []
        self._ray.wait(self._under_way)
        ready, self._under_way = self._ray.wait(self._under_way, num_returns=len(self._under_way), timeout=0)
        return [(reference, self._result(reference)) for reference in ready]

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # what the work itself raises comes back as a result
            last_line = str(error).strip().rpartition("\n")[2]
            raise InputError(
                f"a worker of the cluster cannot run the work ({last_line}); install the same spectralbasis on every "
                "node"
            ) from error
        except self._ray.exceptions.RayError as error:
            first_line = str(error).strip().partition("\n")[0]
            return Death(f"its worker was lost: {type(error).__name__}: {first_line}")

    def close(self) -> None:
        for reference in self._under_way:
            self._ray.cancel(reference, force=True)
        self._under_way = []
        if self._ours:
            self._ray.shutdown()


def _perform_on_one_thread(work: Any, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return perform(work, arguments)


def connect_ray(address: str, **local: Any) -> tuple[Any, bool]:
    """The Ray module, connected to a cluster, and whether the connection is ours to end; no figures of use are sent.

    Args:
        address: of the cluster; "auto" for the one that this machine belongs to, "local" for one made here, which
            listens to this machine alone.
        local: settings of `ray.init` for a cluster that is made here.

    Raises:
        InputError: Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs the package ray; pip install 'spectralbasis[ray]'") from error
    if ray.is_initialized():
        return ray, False
    if ":" in address:  # Ray itself would try for more than a minute where nobody listens
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        except (OSError, ValueError, OverflowError) as error:
            raise _no_cluster(address, error) from error
    options = {"include_dashboard": False, **local} if address == LOCAL else {}
    job = ray.job_config.JobConfig()
    # Ray extends this list by the working folder, in which its workers would then look for `numpy` and for this package
    # first; it has no setting to leave that out.
    job._py_driver_sys_path = _Importable()
    try:
        with _on_loopback(ray) if address == LOCAL else nullcontext():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, job_config=job, **options)
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error
    return ray, True


@contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """Ray's processes that start meanwhile listen to this machine alone, as Ray has them do on Windows and macOS."""
    constants = ray._private.ray_constants
    before = constants.ENABLE_RAY_CLUSTER, os.environ.get(_CLUSTERS)
    constants.ENABLE_RAY_CLUSTER, os.environ[_CLUSTERS] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        os.environ.pop(_CLUSTERS)
        if before[1] is not None:
            os.environ[_CLUSTERS] = before[1]


class _Importable(list[str]):
    """Folders that workers import from: those alone that this process imports from too."""

    def extend(self, folders: Iterable[str]) -> None:
        here = {Path(folder).absolute() for folder in sys.path}
        super().extend(folder for folder in folders if Path(folder).absolute() in here)


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(f"no Ray cluster answers at {address!r} ({error}); start one, or pass --ray local")


@dataclass
class _Job(Generic[Key]):
    """A call under its key, and how often its worker has died."""

    key: Key
    call: Call
    deaths: int = 0


class Crew(Generic[Key]):
    """Calls under way on an executor, each under a key of the caller's.

    A call whose worker dies costs no other: it alone is tried again, the last time with nothing beside it, since a
    worker may have died for lack of memory that others took.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self._under_way: dict[Hashable, _Job[Key]] = {}
        self._suspects: deque[_Job[Key]] = deque()

    @property
    def keys(self) -> set[Key]:
        """The keys of calls that have no result yet."""
        return {job.key for job in (*self._under_way.values(), *self._suspects)}

    @property
    def has_room(self) -> bool:
        """Whether another call may be started now."""
        return not self._suspects and len(self._under_way) < self.executor.slots

    def start(self, key: Key, work: Callable[..., Any], *arguments: Any, memory: int = 0) -> None:
        """Start a call; `memory` is what it takes at most, where that is known."""
        self._start(_Job(key, Call(work, arguments, memory)))

    def finished(self) -> list[tuple[Key, Any]]:
        """Wait for calls to end: their keys, each with the result or a `Failure`; empty once none is under way."""
        done: list[tuple[Key, Any]] = []
        while not done and (self._under_way or self._suspects):
            if not self._under_way:
                self._start(self._suspects[0])
            for ticket, result in self.executor.finished():
                job = self._under_way.pop(ticket)
                if self._suspects and self._suspects[0] is job:
                    self._suspects.popleft()
                if isinstance(result, Death):
                    job.deaths += 1
                    if job.deaths < ATTEMPTS - 1:
                        self._start(job)
                        continue
                    if job.deaths < ATTEMPTS:
                        self._suspects.append(job)
                        continue
                    result = Failure(
                        f"tried {ATTEMPTS} times, the last time with no other task running: {result.reason}"
                    )
                done.append((job.key, result))
        return done

    def _start(self, job: _Job[Key]) -> None:
        self._under_way[self.executor.start(job.call)] = job


def perform(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The result of a call, or a `Failure` with what it raised."""
    try:
        return work(*arguments)
    except Exception as error:
        return Death(f"too little memory ({error})") if out_of_memory(error) else Failure(describe(error))


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that an allocation failed; torch raises a plain RuntimeError on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def describe(error: Exception) -> str:
    """What an exception says; where nobody foresaw it, with the place in the code."""
    if isinstance(error, SpectralBasisError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"


def native_bf16() -> bool:
    """Whether this machine multiplies bfloat16; where it must emulate, that is slower than float32, up to tenfold."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cores() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
