"""One fault: what is done, how often, and what came of each try."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.faults.bench import Bench
from benchmarks.faults.commands import Ended, without_paths

Outcome = Literal["as undisturbed", "refused", "other values"]
"""Where it all ended: in the undisturbed run's results, in a refusal with a sentence, or in other values."""


@dataclass(frozen=True)
class Trial:
    """One try.

    Attributes:
        ended: the command that met the fault.
        outcome: where it ended, also after the command was given again.
        lost: what was there before, or was finished, and is no more; empty where nothing.
    """

    ended: Ended
    outcome: Outcome
    lost: str = ""


@dataclass(frozen=True)
class Case:
    """A fault and the command that meets it.

    Attributes:
        group: kind of fault.
        name: what happens to which command.
        trials: makes so many tries, or as many as there are where it is told 0.
        many: tries of the whole run.
        few: tries of the tests on every change; None for none.
        again: options with which a person gives the command again afterwards; None where that changes nothing.
        expected: where it may end.
    """

    group: str
    name: str
    trials: Callable[[Bench, int], Iterator[Trial]]
    many: int
    few: int | None = None
    again: str | None = ""
    expected: tuple[Outcome, ...] = ("as undisturbed",)


def summary(case: Case, trials: list[Trial]) -> dict[str, Any]:
    """What the table shows of a case."""
    said = Counter(without_paths(trial.ended.told) for trial in trials if trial.ended.told)
    return {
        "group": case.group,
        "name": case.name,
        "again": case.again,
        "trials": len(trials),
        "exit_codes": sorted({trial.ended.code for trial in trials}),
        "outcomes": dict(Counter(trial.outcome for trial in trials)),
        "lost": sorted({trial.lost for trial in trials if trial.lost}),
        "told": [message for message, _ in said.most_common(3)],
        "tracebacks": sum(trial.ended.traceback for trial in trials),
    }


def complaints(case: Case, trials: list[Trial]) -> list[str]:
    """What should not have been: a traceback, a loss, an end that is not expected; nothing where all is well."""
    found = [f"traceback: {trial.ended.stderr}" for trial in trials if trial.ended.traceback]
    found += [f"lost: {trial.lost}; told: {trial.ended.told}" for trial in trials if trial.lost]
    found += [
        f"{trial.outcome}; exit code {trial.ended.code}; told: {trial.ended.told}"
        for trial in trials
        if trial.outcome not in case.expected
    ]
    return found if trials else ["no try was made"]
