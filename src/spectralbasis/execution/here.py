"""Work in this process."""

from collections.abc import Hashable
from typing import Any

from spectralbasis.execution.executor import Call, Executor, perform


class Here(Executor):
    """Runs each call when it is started, one after the other, with all threads."""

    travels = False

    def __init__(self) -> None:
        self._done: list[tuple[Hashable, Any]] = []
        self._started = 0

    @property
    def workers(self) -> int:
        return 1

    def start(self, call: Call) -> int:
        self._started += 1
        self._done.append((self._started, perform(call.work, call.arguments)))
        return self._started

    def finished(self) -> list[tuple[Hashable, Any]]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done.clear()
