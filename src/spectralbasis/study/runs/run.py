"""What a study is made of: runs, each told apart by its content, and what is known of them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd


@dataclass(frozen=True, eq=False)
class Run:
    """One unit of work; runs of the same content are one, whoever asks for them.

    Args:
        action: what is done, a key of `ACTIONS`.
        settings: plain JSON, all that decides the result save the seed and where the data lie.
        seed: of everything random in it.
        needs: role → an earlier run, whose folder this one reads.
    """

    action: str
    settings: Mapping[str, Any]
    seed: int = 0
    needs: Mapping[str, "Run"] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Hash of the content, the needs' included."""
        return run_key(self.action, self.settings, self.seed, {role: run.key for role, run in self.needs.items()})

    @property
    def kind(self) -> tuple[str, ...]:
        """The action, the model, the task and all other settings that are words, from the general to the special."""
        words = {name: value for name, value in self.settings.items() if isinstance(value, str)}
        order = sorted(words, key=lambda name: (name != "model", name != "task", name))
        return (self.action, *(words[name] for name in order))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        """The action and settings, words as they are and numbers by their names, and the seed."""
        words, others = [self.action], []
        for name, value in self.settings.items():
            if isinstance(value, str):
                words.append(value)
            elif value is True:
                others.append(name)
            elif isinstance(value, int | float) and value:
                others.append(f"{name} {value:g}")
        return ", ".join([" ".join(words), *others, f"seed {self.seed}"])


def run_key(action: str, settings: Mapping[str, Any], seed: int, needs: Mapping[str, str]) -> str:
    """What tells a run apart; see `Run`. `needs` is role → key."""
    content = json.dumps([action, settings, seed, needs], sort_keys=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def with_needs(runs: Iterable[Run]) -> Iterator[Run]:
    """Each run once, after those that it needs."""
    seen: set[Run] = set()

    def visit(run: Run) -> Iterator[Run]:
        if run not in seen:
            seen.add(run)
            for need in run.needs.values():
                yield from visit(need)
            yield run

    for run in runs:
        yield from visit(run)


@dataclass(frozen=True)
class Site:
    """Where a run happens.

    Args:
        data: the folder of all data sets that the user named, or None.
        folder: the run's own, empty at first; what it writes there is kept while later runs need it.
        needs: role → folder of the finished run.
    """

    data: Path | None
    folder: Path
    needs: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: plain JSON, and tidy measurements where there are many."""

    result: Mapping[str, Any]
    measurements: pd.DataFrame | None = None


Action = Callable[[Run, Site], Outcome]


@dataclass(frozen=True)
class Record:
    """A finished run as the store keeps it; `measurements` is empty where there are none."""

    result: Mapping[str, Any]
    measurements: pd.DataFrame
    seconds: float
    versions: Mapping[str, Any]
    seed: int


class Results:
    """What is known so far: the records of finished runs, and the errors of failed ones."""

    def __init__(self, records: Mapping[str, Record], errors: Mapping[str, str] | None = None) -> None:
        self._records = records
        self._errors = errors or {}

    def get(self, run: Run) -> Record | None:
        """The record of a run; None where it is not done, or failed."""
        return self._records.get(run.key)

    def error(self, run: Run) -> str | None:
        """Why the run failed; None where it did not."""
        return self._errors.get(run.key)
