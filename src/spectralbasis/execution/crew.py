"""Keeps an executor busy with a bounded number of calls, and tries again those whose worker died."""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from spectralbasis.execution.executor import ATTEMPTS, Call, Death, Executor, Failure

Key = TypeVar("Key", bound=Hashable)


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
                if not self._try_again(job, result):
                    done.append((job.key, _final(result)))
        return done

    def _start(self, job: _Job[Key]) -> None:
        self._under_way[self.executor.start(job.call)] = job

    def _try_again(self, job: _Job[Key], result: Any) -> bool:
        """Give a call whose worker died another attempt, if it has one left; says whether it did."""
        if self._suspects and self._suspects[0] is job:
            self._suspects.popleft()
        if not isinstance(result, Death):
            return False
        job.deaths += 1
        if job.deaths < ATTEMPTS - 1:
            self._start(job)
        elif job.deaths < ATTEMPTS:
            self._suspects.append(job)
        return job.deaths < ATTEMPTS


def _final(result: Any) -> Any:
    """The result as the caller gets it."""
    if not isinstance(result, Death):
        return result
    return Failure(f"tried {ATTEMPTS} times, the last time with nothing beside it: {result.reason}")
