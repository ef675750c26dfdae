"""One copy of a bank in a process of its own, as Ray Serve starts it, and the table of tasks that all copies follow.

Every request carries the number of changes of tasks that its answer must know. A replica that knows fewer asks the
table, a small actor, for the rest before it computes the batch. So no answer is older than the last acknowledged
change, and a replica that Ray starts again, from the bank's file, catches up with its first batch.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectralbasis.coefficients.bank import CoefficientBank
from spectralbasis.coefficients.bank_file import stored_checksum
from spectralbasis.coefficients.serving import Rows
from spectralbasis.coefficients.serving_requests import Pair, Text
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.execution import describe

ROWS_OF_A_BATCH = 128
"""Inputs that are computed together at most; what a single request has more is computed in several passes."""

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

        close_internal_port()
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


def close_internal_port() -> None:
    """Keep Ray Serve from opening a port of this replica.

    It would listen on all interfaces and unpickle whatever anybody sends, and only handles that are told to use gRPC
    need it. Ray has no setting for it; a replica opens it after its constructor.

    Raises:
        RuntimeError: this release of Ray opens it in another way.
    """
    from ray.serve._private import replica

    if not hasattr(replica, "add_port_to_grpc_server"):
        raise RuntimeError("this release of Ray opens a port in a way that is not known; install ray[serve]==2.60.0")
    replica.add_port_to_grpc_server = lambda server, address: 0


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
