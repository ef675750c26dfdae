"""Replicas of a bank on Ray Serve, and the one table of tasks that all of them follow.

The process that takes requests counts the changes of tasks, and every request carries the number of changes that there
were. A replica that knows fewer asks the table, a small actor, for the rest before it computes the batch. So no answer
is older than the last acknowledged change, and a replica that Ray starts again, from the bank's file, catches up with
its first batch. The process keeps the changes too, and fills the table again where Ray had to restart it.
"""

import asyncio
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralbasis.coefficients.bank import CoefficientBank
from spectralbasis.coefficients.bank_file import BankFile, stored_checksum
from spectralbasis.coefficients.serving import Pair, Rows, Text, Unavailable, UnknownTask
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.execution import ATTEMPTS, LOCAL, connect_ray, cores, describe

ROWS_OF_A_BATCH = 128
"""Inputs that are computed together at most; what a single request has more is computed in several passes."""
_SECONDS_BETWEEN_ATTEMPTS = 0.1
_SECONDS_TO_GATHER = 0.005
_ONGOING = 1024
"""Requests that Ray lets wait in one replica."""

Row = bytes | None
"""The numbers of a task as bytes; None where the task was removed."""


class TaskTable:
    """The changes of tasks since the bank's file, of each task the last one, numbered in their order."""

    def __init__(self) -> None:
        self._version = 0
        self._changes: dict[str, tuple[int, Row]] = {}

    @property
    def version(self) -> int:
        """How many changes there were."""
        return self._version

    def held(self) -> int:
        """The version, for those who ask from another process."""
        return self._version

    def extend(self, start: int, version: int, changes: Sequence[tuple[str, Row]]) -> bool:
        """Enter changes, and say whether that was possible: not where this table lacks some of the first `start`.

        Args:
            start: number of changes before these.
            version: number of changes with these.
            changes: task and numbers.

        Examples:
            >>> table = TaskTable()
            >>> table.extend(0, 1, [("rte", b"numbers")]), table.extend(7, 8, [("rte", None)])
            (True, False)
            >>> table.since(0)
            (1, [('rte', b'numbers')])
        """
        if start > self._version:
            return False
        if version > self._version:
            for task, row in changes:
                self._changes.pop(task, None)
                self._changes[task] = version, row
            self._version = version
        return True

    def since(self, version: int) -> tuple[int, list[tuple[str, Row]]]:
        """How many changes there were, and the last of each task that changed after the first `version`."""
        changed: list[tuple[str, Row]] = []
        for task, (number, row) in reversed(self._changes.items()):  # the latest stand at the end
            if number <= version:
                break
            changed.append((task, row))
        return self._version, changed[::-1]


class Asked(NamedTuple):
    """One request in a replica: its task, its inputs, and how many changes of tasks its answer must know."""

    task: str
    inputs: list[Text | Pair]
    version: int


@dataclass(frozen=True)
class Failed:
    """In place of an answer: what was wrong, as text, since an exception might not travel.

    Attributes:
        kind: `unknown` task, `behind` the table, `unavailable` replicas, an `input` that is refused, or an `error` that
            nobody foresaw.
        reason: a sentence.
    """

    kind: str
    reason: str = ""


@dataclass(frozen=True)
class Opened:
    """What a replica needs to open a bank; it travels to all of them.

    Attributes:
        load: from nothing to the model and its reader of texts (see `BankReplica`); a function that workers import.
        file: of the bank.
        checksum: of the file, which must be the same for all replicas, also for those that start later.
        threads: that a replica computes with.
    """

    load: Callable[[], tuple[nn.Module, Any]]
    file: str
    checksum: str
    threads: int


class BankReplica:
    """One copy of the model with the bank's file mapped: batches over all tasks, one at a time.

    Args:
        opened: what to open. Its reader gives for inputs the tokens of each, and whether they were cut; its `batch`
            pads rows of tokens.
        table: the actor of the `TaskTable`.
    """

    def __init__(self, opened: Opened, table: Any) -> None:
        from ray import serve

        torch.set_num_threads(opened.threads)
        if stored_checksum(Path(opened.file)) != opened.checksum:
            raise InputError(f"the bank {opened.file} was replaced since the server started; start the server again")
        model, self._reader = opened.load()
        self._bank = CoefficientBank.open(opened.file, model)
        self._table = table
        self._version = 0
        self._computing = ThreadPoolExecutor(1)  # hooks and the inference mode belong to a thread

        @serve.batch(max_batch_size=ROWS_OF_A_BATCH, batch_wait_timeout_s=0, batch_size_fn=rows_of)
        async def batched(calls: list[list[Asked]]) -> list[list[Any]]:
            answers = iter(await self.answer([request for call in calls for request in call]))
            return [[next(answers) for _ in call] for call in calls]

        self._batched = batched

    async def predict(self, questions: list[tuple[str, list[Text | Pair]]], version: int) -> list[Any]:
        """Of each task with its inputs the `Rows`, or what `Failed`; calls that wait meanwhile share a batch.

        Args:
            questions: tasks, each with its inputs.
            version: how many changes of tasks the answers must know.
        """
        asked = [Asked(task, inputs, version) for task, inputs in questions]
        if rows_of([asked]) > ROWS_OF_A_BATCH:  # which no batch has room for
            return await self.answer(asked)
        answers: list[Any] = await self._batched(asked)
        return answers

    async def answer(self, requests: list[Asked]) -> list[Any]:
        """Of each request the `Rows`, or what `Failed`; one that fails takes no other along."""
        needed = max(request.version for request in requests)
        if needed > self._version:
            version, changes = await self._table.since.remote(self._version)
            if version < needed:
                return [Failed("behind")] * len(requests)
            await self._in_thread(self._follow, version, changes)
        answers: list[Any] = await self._in_thread(self._compute, requests)
        return answers

    async def pack(self, task: str, folder: str) -> bytes | Failed:
        """The numbers of an adapter's task, checked against the bank."""
        try:
            row = await asyncio.to_thread(self._bank.pack, task, folder)
        except SpectralBasisError as error:
            return Failed("input", str(error))
        return row.view(torch.uint8).numpy().tobytes()

    async def ping(self) -> bool:
        """True, from a replica that lives."""
        return True

    async def _in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._computing, work, *arguments)

    def _follow(self, version: int, changes: Sequence[tuple[str, Row]]) -> None:
        if version <= self._version:
            return
        for task, row in changes:
            if row is not None:
                self._bank.add(task, torch.frombuffer(bytearray(row), dtype=self._bank.dtype))
            elif task in self._bank:
                self._bank.remove(task)
        self._version = version

    def _compute(self, requests: list[Asked]) -> list[Any]:
        known = [request for request in requests if request.task in self._bank]
        try:
            found = iter(self._rows(known))
        except Exception as error:
            if len(known) > 1:
                return [self._compute([request])[0] for request in requests]
            kind = "input" if isinstance(error, SpectralBasisError) else "error"
            found = iter([Failed(kind, describe(error))])
        return [next(found) if request.task in self._bank else Failed("unknown") for request in requests]

    def _rows(self, requests: list[Asked]) -> list[Any]:
        """One answer for each request; rows of a like length are computed together, since they need little padding."""
        tasks = [request.task for request in requests for _ in request.inputs]
        read = self._reader([one for request in requests for one in request.inputs])
        order = sorted(range(len(read)), key=lambda row: len(read[row][0]["input_ids"]))
        logits: list[list[float]] = [[]] * len(read)
        for start in range(0, len(order), ROWS_OF_A_BATCH):
            chosen = order[start : start + ROWS_OF_A_BATCH]
            batch = self._reader.batch([read[row][0] for row in chosen])
            found = self._bank(**batch, tasks=[tasks[row] for row in chosen]).logits
            for row, numbers in zip(chosen, _finite(found), strict=True):
                logits[row] = numbers
        answers, start = [], 0
        for request in requests:
            end = start + len(request.inputs)
            answers.append(Rows(request.task, logits[start:end], [cut for _, cut in read[start:end]]))
            start = end
        return answers


def rows_of(calls: list[list[Asked]]) -> int:
    """How many inputs the requests of some calls have."""
    return sum(len(request.inputs) for call in calls for request in call)


def _finite(logits: Tensor) -> Iterator[list[float]]:
    """Logits of each row, without the -inf of labels that its task does not have.

    Raises:
        InputError: a number is not one.
    """
    present = logits != -torch.inf
    if not bool((torch.isfinite(logits) | ~present).all()):
        raise InputError("the model gives numbers that are not finite for one of the inputs")
    counts = present.sum(-1).tolist()
    for row, count in zip(logits.float().tolist(), counts, strict=True):
        yield row[:count]


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
        taken, rows = [], 0
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

        deaths = 0
        try:
            async with asyncio.timeout(seconds):
                while deaths < ATTEMPTS:
                    try:
                        return await getattr(self._handle, method).remote(*arguments)
                    except RayTaskError:
                        raise
                    except (RayError, RayServeException) as error:
                        deaths += isinstance(error, RayActorError)
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
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    if is_local:  # else other users of this machine could run code as this one, through the ports of Ray
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    module, ours = connect_ray(ray or LOCAL, **settings)
    from ray import serve

    name = f"spectralbasis-{secrets.token_hex(4)}"
    try:
        _check_room(module, replicas, threads)
        table = module.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(TaskTable).remote()
        serve.start(proxy_location="Disabled")
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
