"""Ways to tune that are compared: all choose learning rates by one rule, on other examples than they are scored on."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from spectralbasis.study.experiments.subjects import Subject
from spectralbasis.study.runs import Results, Run

Needs = Callable[[Subject, str], Mapping[str, Run]]
COEFFICIENTS = {"method": "spectral", "scaling": "absolute"}
"""Settings of all arms that train spectral coefficients; their learning rates are meant in this unit."""
FURTHER_RATES = 3
"""How many rates an arm may try beyond those it begins with, as long as the best is the first or the last."""
COLUMNS = ("subject", "arm", "task", "seed", "learning_rate", "score", "backbone", "head", "model", "seconds_per_step",
           "precision", "adapter_bytes")  # fmt: skip


def needs_nothing(subject: Subject, task: str) -> Mapping[str, Run]:
    """The needs of an arm that has none but the model."""
    return {}


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    Args:
        name: in tables.
        settings: of `tune`: the method and its options.
        learning_rates: among which it chooses, from small to large; while the best is the first or the last, the next
            of the series is tried too.
        needs: what it needs for a subject and a task, such as a basis.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    needs: Needs = needs_nothing

    def run(self, subject: Subject, task: str, learning_rate: float, seed: int) -> Run:
        """One tuning."""
        settings = {**self.settings, "learning_rate": learning_rate}
        return subject.tune(task, seed, needs=self.needs(subject, task), **settings)


@dataclass(frozen=True)
class Contest:
    """Arms that are compared on one subject.

    Args:
        subject: the model and its tasks.
        arms: what is compared.
        selection_tasks: on whose selection halves, with the first seed, the learning rates are chosen.
        seeds: of the runs that count.
    """

    subject: Subject
    arms: tuple[Arm, ...]
    selection_tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def size(self) -> int:
        """Number of runs that count, whether their rates are known yet or not."""
        return len(self.arms) * len(self.subject.tasks) * len(self.seeds)

    def plan(self, results: Results) -> list[Run]:
        """All trials of learning rates, then the runs that count of those arms whose rate is known."""
        trials = [run for arm in self.arms for run in self._trials(arm, results)]
        return trials + [run for _, run in self.counted(results)]

    def counted(self, results: Results) -> Iterator[tuple[dict[str, Any], Run]]:
        """The runs at chosen rates, with what tells them apart in tables, one seed of everything after another."""
        rates = {arm.name: self.chosen_rate(arm, results) for arm in self.arms}
        for seed in self.seeds:
            for arm in self.arms:
                rate = rates[arm.name]
                for task in self.subject.tasks if rate is not None else ():
                    labels = {"subject": self.subject.name, "arm": arm.name, "task": task, "seed": seed}
                    yield {**labels, "learning_rate": rate}, arm.run(self.subject, task, rate or 0.0, seed)

    def chosen_rate(self, arm: Arm, results: Results) -> float | None:
        """The rate of the best mean score on the selection halves; None until all trials are done or have failed.

        A task on which every rate failed, such as one whose data are absent, has no say.
        """
        return self._best(arm, self.tried_rates(arm, results), results)

    def tried_rates(self, arm: Arm, results: Results) -> tuple[float, ...]:
        """The arm's rates, from small to large, and up to `FURTHER_RATES` more while the best is at an end."""
        rates = arm.learning_rates
        while 1 < len(rates) < len(arm.learning_rates) + FURTHER_RATES:
            best = self._best(arm, rates, results)
            if best == rates[-1]:
                rates = (*rates, _next_rate(rates[-2], best))
            elif best == rates[0]:
                rates = (_next_rate(rates[1], best), *rates)
            else:
                break
        return rates

    def _best(self, arm: Arm, rates: tuple[float, ...], results: Results) -> float | None:
        if len(rates) == 1:
            return rates[0]
        found = np.array([[_selection_score(run, results) for run in self._at(arm, rate)] for rate in rates])
        usable = found[:, np.isfinite(found).any(axis=0)]
        if np.isnan(found).any() or not usable.size:
            return None
        return rates[int(usable.mean(axis=1).argmax())]

    def scores(self, results: Results) -> pd.DataFrame:
        """A row, with the columns `COLUMNS`, for each finished run that counts."""
        rows = []
        for labels, run in self.counted(results):
            record = results.get(run)
            if record is not None:
                rows.append({**labels, **_facts(record.result)})
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def _trials(self, arm: Arm, results: Results) -> list[Run]:
        """None where there is nothing to choose."""
        rates = self.tried_rates(arm, results)
        return [run for rate in rates for run in self._at(arm, rate)] if len(rates) > 1 else []

    def _at(self, arm: Arm, rate: float) -> list[Run]:
        return [arm.run(self.subject, task, rate, self.seeds[0]) for task in self.selection_tasks]


def _next_rate(before: float, last: float) -> float:
    """The next of a geometric series, with one digit, as rates are written."""
    return float(f"{last * last / before:.0e}")


def _selection_score(run: Run, results: Results) -> float:
    """NaN where the run is not done; a run that failed, as diverged ones do, is worse than all others."""
    record = results.get(run)
    if record is not None:
        return float(record.result["selection_score"])
    return math.nan if results.error(run) is None else -math.inf


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    named = {"backbone": "parameters_backbone", "head": "parameters_head", "model": "parameters_model"}
    same = ("score", "seconds_per_step", "adapter_bytes")
    facts = {**{name: result[key] for name, key in named.items()}, **{name: result[name] for name in same}}
    return facts | {"precision": result.get("precision", "")}  # rows of earlier versions name none
