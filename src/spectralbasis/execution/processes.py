"""Work in local processes side by side."""

import multiprocessing
import os
import signal
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pickle import PicklingError
from typing import Any, cast

import torch
from threadpoolctl import threadpool_limits

from spectralbasis.errors import InputError
from spectralbasis.execution.executor import Call, Death, Executor, Failure, perform

START_METHOD = "spawn"
"""New interpreters: forking a process whose BLAS has started threads can hang it."""
_READY = "ready"
_SAFE_PATH = "PYTHONSAFEPATH"


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
            for connection in wait(list(self._busy)):
                done += self._receive(cast(Connection, connection))
        return done

    def _receive(self, connection: Connection) -> list[tuple[Hashable, Any]]:
        """What a worker has to say: nothing yet, that its call is done, or that it is dead."""
        worker = self._busy[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            del self._busy[connection]
            return [(worker.ticket, worker.bury())]
        if message == _READY:
            worker.ready = True
            return []
        del self._busy[connection]
        self._idle.append(worker)
        return [(worker.ticket, message[0])]

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
        with _without_working_folder(), _ignoring_interrupts():
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

    def bury(self) -> Death:
        """Say what a dead process died of.

        Raises:
            InputError: it failed before it could take any work, as any other would.
        """
        self.process.join()
        self.connection.close()
        code = self.process.exitcode or 0
        if code > 0 and not self.ready:
            raise InputError(
                f"a worker process cannot start (exit code {code}; its error stands above); a script that asks for "
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
def _without_working_folder() -> Iterator[None]:
    """Keep processes that are started here from importing modules of the working folder.

    A new interpreter would look there even for `multiprocessing`. It then takes over the path of this one, so that a
    script's own modules are found in workers as they are here.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Block Ctrl-C in processes that are started here, which would answer it with a traceback while they import.

    One that is pressed meanwhile reaches this process afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which unblocks them when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
