"""The replicas of a bank on Ray Serve, as the process that takes requests sees them.

It sends them what waits, and counts the changes of tasks. It keeps the changes beside the table that the replicas ask,
and fills the table again where Ray had to restart it.
"""

import asyncio
import logging
import os
import secrets
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from spectralbasis.coefficients.bank_file import BankFile
from spectralbasis.coefficients.replicas import ROWS_OF_A_BATCH, BankReplica, Failed, Opened, Row, TaskTable
from spectralbasis.coefficients.serving import Rows, Unavailable, UnknownTask
from spectralbasis.coefficients.serving_requests import Pair, Text
from spectralbasis.errors import InputError
from spectralbasis.execution import ATTEMPTS, LOCAL, connect_ray, cores

_SECONDS_BETWEEN_ATTEMPTS = 0.1
_SECONDS_TO_GATHER = 0.005
_ONGOING = 1024
"""Requests that Ray lets wait in one replica."""


@dataclass
class _Waiting:
    """A request in the process that takes requests, until it has its answer."""

    task: str
    inputs: list[Text | Pair]
    ends: float
    answer: "asyncio.Future[Any]"


class RayBank:
    """The `Backend` of `BankApplication` over replicas on Ray Serve; made by `started`.

    Requests that come while replicas compute wait here and travel together: a call costs Ray milliseconds.

    Args:
        handle: of the deployment of `BankReplica`.
        table: the actor of the `TaskTable`.
        tasks: names of all tasks in the bank's file.
        replicas: how many there are.
    """

    def __init__(self, handle: Any, table: Any, tasks: Sequence[str], replicas: int = 1) -> None:
        self.tasks = dict.fromkeys(tasks)
        self._handle = handle
        self._table = table
        self._slots = 2 * replicas  # calls under way: one that is computed, and one that follows at once
        self._queue: deque[_Waiting] = deque()
        self._gathering: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._changes = TaskTable()
        self._filling = asyncio.Lock()

    async def predict(self, task: str, inputs: Sequence[Text | Pair], seconds: float) -> Rows:
        """See `Backend`. A request whose replica dies is given to another, since it changes nothing."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(task, list(inputs), loop.time() + seconds, loop.create_future())
        self._queue.append(waiting)
        self._send_soon()
        try:
            async with asyncio.timeout(seconds):
                found = await waiting.answer
        except TimeoutError as error:
            raise _none_answered(seconds) from error
        if isinstance(found, Failed):
            raise _exception(found, task)
        return found

    def _send_soon(self) -> None:
        """Start a call with what waits, if there is a slot for it."""
        if self._queue and self._gathering is None and len(self._calls) < self._slots:
            self._gathering = asyncio.create_task(self._gather())

    async def _gather(self) -> None:
        if self._calls:
            await asyncio.sleep(_SECONDS_TO_GATHER)  # answers bring new requests, which may travel together
        self._gathering = None
        taken: list[_Waiting] = []
        rows = 0
        while self._queue and (not taken or rows + len(self._queue[0].inputs) <= ROWS_OF_A_BATCH):
            waiting = self._queue.popleft()
            if not waiting.answer.done():  # else it waited too long
                taken.append(waiting)
                rows += len(waiting.inputs)
        if taken:
            call = asyncio.create_task(self._call(taken))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            call.add_done_callback(lambda _: self._send_soon())
        self._send_soon()

    async def _call(self, taken: list[_Waiting]) -> None:
        """Ask a replica for several requests, and give each its answer."""
        seconds = max(waiting.ends for waiting in taken) - asyncio.get_running_loop().time()
        answers: Sequence[Any]
        try:
            answers = await self._predicted([(waiting.task, waiting.inputs) for waiting in taken], seconds)
        except Unavailable as error:
            answers = [Failed("unavailable", str(error))] * len(taken)
        except Exception as error:
            answers = [Failed("error", f"{type(error).__name__}: {error}")] * len(taken)
        for waiting, answer in zip(taken, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)

    async def _predicted(self, questions: list[tuple[str, list[Text | Pair]]], seconds: float) -> list[Any]:
        ends = time.monotonic() + seconds
        while True:
            found: list[Any] = await self._asked("predict", seconds, questions, self._changes.version)
            seconds = ends - time.monotonic()
            if Failed("behind") not in found:
                return found
            await self._fill(seconds)

    async def add(self, task: str, folder: Path, seconds: float) -> bool:
        """See `Backend`."""
        row = await self._asked("pack", seconds, task, str(folder))
        if isinstance(row, Failed):
            raise _exception(row, task)
        is_new = task not in self.tasks
        await self._change(task, row, seconds)
        return is_new

    async def remove(self, task: str, seconds: float) -> None:
        """See `Backend`."""
        if task not in self.tasks:
            raise UnknownTask(task)
        await self._change(task, None, seconds)

    async def answers(self, seconds: float) -> bool:
        """See `Backend`."""
        try:
            return bool(await self._asked("ping", seconds))
        except Unavailable:
            return False

    async def _asked(self, method: str, seconds: float, *arguments: Any) -> Any:
        """What a replica answers, with another attempt where one dies meanwhile.

        Raises:
            Unavailable: no replica answered in this time.
        """
        from ray.exceptions import RayActorError, RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        dead: set[Any] = set()
        try:
            async with asyncio.timeout(seconds):
                while len(dead) < ATTEMPTS:
                    try:
                        return await getattr(self._handle, method).remote(*arguments)
                    except RayTaskError:
                        raise
                    except (RayError, RayServeException) as error:
                        if isinstance(error, RayActorError):  # several times of one, until it is known to be dead
                            dead.add(error.actor_id)
                        await asyncio.sleep(_SECONDS_BETWEEN_ATTEMPTS)
        except TimeoutError as error:
            raise _none_answered(seconds) from error
        raise Unavailable(f"{ATTEMPTS} replicas died over this request or others beside it")

    async def _change(self, task: str, row: Row, seconds: float) -> None:
        """Count a change, from where on requests carry its number, and give it to the table."""
        start = self._changes.version
        self._changes.extend(start, start + 1, [(task, row)])
        if row is None:
            del self.tasks[task]
        else:
            self.tasks[task] = None
        try:
            await self._fill(seconds)
        except Unavailable as error:
            raise Unavailable(f"the change of {task!r} is not in the table of tasks yet ({error})") from error

    async def _fill(self, seconds: float) -> None:
        """Give the table what it lacks: a change, or everything where Ray had to restart it.

        Raises:
            Unavailable: the table did not answer in this time.
        """
        from ray.exceptions import RayError

        try:
            async with asyncio.timeout(seconds), self._filling:
                while True:
                    held = await self._table.held.remote()
                    version, changes = self._changes.since(held)
                    if version <= held or await self._table.extend.remote(held, version, changes):
                        return
        except (RayError, TimeoutError) as error:
            raise Unavailable("the table of tasks does not answer") from error


def _none_answered(seconds: float) -> Unavailable:
    return Unavailable(f"no replica answered in {seconds:.3g} seconds")


def _exception(failed: Failed, task: str) -> Exception:
    """What a failure is in the process that takes requests."""
    if failed.kind == "unknown":
        return UnknownTask(task)
    kinds: dict[str, type[Exception]] = {"input": InputError, "unavailable": Unavailable}
    return kinds.get(failed.kind, RuntimeError)(failed.reason)


@contextmanager
def started(
    load: Callable[[], tuple[nn.Module, Any]],
    file: Path,
    bank: BankFile,
    *,
    replicas: int = 1,
    threads: int | None = None,
    ray: str | None = None,
) -> Iterator[RayBank]:
    """Replicas of a bank on Ray Serve, until the context is left.

    Args:
        load: see `Opened`.
        file: of the bank.
        bank: what the file says of itself.
        replicas: copies of the model.
        threads: that each computes with; None gives each its share of the cores here, and one on a cluster.
        ray: address of a cluster; None makes one here, which listens to this machine alone.

    Raises:
        InputError: there is no Ray, the cluster has too few cores, or a replica cannot open the bank.
    """
    is_local = ray in (None, LOCAL)
    threads = threads or (max(1, cores() // replicas) if is_local else 1)
    settings = {"num_cpus": max(cores(), replicas * threads), "object_store_memory": 128 << 20}
    if is_local:  # else other users of this machine could run code as this one, through the ports of Ray
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    module, ours = connect_ray(ray or LOCAL, **settings)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)  # Ray's own handlers would end this process without what follows
    from ray import serve

    name = f"spectralbasis-{secrets.token_hex(4)}"
    try:
        _check_room(module, replicas, threads)
        table = module.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(TaskTable).remote()
        notes = logging.getLogger("ray.serve")
        notes.setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")
        notes.setLevel(logging.ERROR)  # which it has set anew
        deployment = serve.deployment(BankReplica, name="bank").options(
            num_replicas=replicas,
            max_ongoing_requests=_ONGOING,
            health_check_period_s=2,
            graceful_shutdown_timeout_s=20,
            max_constructor_retry_count=3,
            ray_actor_options={"num_cpus": threads},
        )
        handle = _run(serve, deployment.bind(Opened(load, str(file.absolute()), bank.checksum, threads), table), name)
        yield RayBank(handle, table, bank.tasks, replicas)
    finally:
        _end(module, serve, name, ours)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check_room(module: Any, replicas: int, threads: int) -> None:
    available = int(module.cluster_resources().get("CPU", 0))
    if replicas * threads > available:
        raise InputError(
            f"{replicas} replicas of {threads} threads need {replicas * threads} cores, and the cluster has "
            f"{available}; pass fewer --replicas or --threads"
        )


def _run(serve: Any, application: Any, name: str) -> Any:
    """Start an application and wait for its replicas.

    Raises:
        InputError: a replica cannot open the model or the bank.
    """
    try:
        return serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        status = serve.status().applications.get(name)
        messages = [one.message for one in status.deployments.values()] if status else []
        reason = next(
            (line for text in messages for line in reversed(text.splitlines()) if "Error:" in line), str(error)
        )
        raise InputError(f"the replicas cannot start: {reason.strip()}") from error


def _end(module: Any, serve: Any, name: str, ours: bool) -> None:
    """Take the replicas down; on a cluster of others, nothing but them."""
    if not module.is_initialized():
        return
    if ours:
        serve.shutdown()
        module.shutdown()
    else:
        serve.delete(name)
