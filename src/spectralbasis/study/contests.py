"""Contests between ways to tune, and the claims about who scores higher.

All arms choose learning rates by one rule, on examples other than those for the score.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from spectralbasis.comparison.statistics import Interval
from spectralbasis.report.study_page import Stated
from spectralbasis.study.claims import Claim, as_family, conclude, conclude_equal, task_units
from spectralbasis.study.estimates import paired_comparison
from spectralbasis.study.runs import Results, Run
from spectralbasis.study.subjects import Subject


@dataclass(frozen=True)
class Contrast:
    """One arm, or kind of arm, against another.

    Args:
        name: of the claim.
        text: the claim, true where `better` scores above `worse` by more than minus the margin.
        better, worse: values of the compared column.
        would_change: what would have to be seen for another verdict.
        margin: how far below still counts as no worse.
        stated: see `Claim`.
    """

    name: str
    text: str
    better: str
    worse: str
    would_change: str
    margin: float = 0.0
    stated: Stated = "before"


def differences(scores: pd.DataFrame, column: str, better: str, worse: str, by: Sequence[str]) -> pd.DataFrame:
    """Pairs of scores that differ in `column` alone: the columns of `by`, `better` and `worse`."""
    wide = scores[scores[column].isin([better, worse])].pivot_table(index=list(by), columns=column, values="score")
    for name in (better, worse):
        if name not in wide:
            wide[name] = np.nan
    pairs = wide.dropna(subset=[better, worse]).reset_index()
    return pairs.rename(columns={better: "better", worse: "worse"})


Compare = Callable[[pd.DataFrame], tuple[Interval, str]]
"""Pairs of scores, see `differences` → the interval of their mean difference, and what it is over."""


def compare_pairs(pairs: pd.DataFrame) -> tuple[Interval, str]:
    """The mean difference; tasks of a subject are the units, since seeds and cells of one task are not independent."""
    found = paired_comparison(pairs["better"], pairs["worse"], pairs["subject"] + " / " + pairs["task"])
    return found, task_units(pairs, "subject")


def conclude_family(
    contrasts: Sequence[Contrast],
    scores: pd.DataFrame,
    column: str,
    by: Sequence[str],
    unit: str = "score",
    compare: Compare = compare_pairs,
) -> list[Claim]:
    """A claim for each contrast, with Holm's p-values over all of them.

    Args:
        contrasts: what is compared.
        scores: with the columns `subject`, `task`, `score`, `column` and those of `by`.
        column: whose values are compared.
        by: what pairs have in common.
        unit: of the effects.
        compare: what the units of the comparison are.

    Returns:
        Claims whose p-values are adjusted; those that are not below 0.05 then are undecided, except that a margin is
        judged by the interval alone.
    """
    claims = []
    for one in contrasts:
        pairs = differences(scores, column, one.better, one.worse, by)
        found, units = compare(pairs)
        claims.append(
            conclude(
                one.name, one.text, found, unit=unit, would_change=one.would_change, runs=2 * len(pairs), units=units,
                margin=one.margin, stated=one.stated,
            )
        )  # fmt: skip
    return as_family(claims)


def conclude_equality(
    contrasts: Sequence[Contrast],
    scores: pd.DataFrame,
    column: str,
    by: Sequence[str],
    within: float,
    compare: Compare = compare_pairs,
) -> list[Claim]:
    """For each contrast, the claim that its arms' mean scores differ by less than `within`; see `conclude_equal`."""
    claims = []
    for one in contrasts:
        pairs = differences(scores, column, one.better, one.worse, by)
        found, units = compare(pairs)
        claims.append(
            conclude_equal(
                f"{one.better} equals {one.worse}",
                f'The mean scores of "{one.better}" and "{one.worse}" differ by less than {within:g}.',
                found, within=within, unit="score", runs=2 * len(pairs), units=units, stated=one.stated,
            )
        )  # fmt: skip
    return claims


Needs = Callable[[Subject, str], Mapping[str, Run]]
COEFFICIENTS = {"method": "spectral", "scaling": "absolute"}
"""Settings of all arms that train spectral coefficients; their learning rates are meant in this unit."""
FURTHER_RATES = 3
"""How many rates an arm may try beyond its own, as long as the best is the first or the last."""
COLUMNS = ("subject", "arm", "task", "seed", "learning_rate", "score", "backbone", "head", "model", "seconds_per_step",
           "precision", "adapter_bytes", "selection_score")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to tune.

    Args:
        name: in tables.
        settings: of `tune`: the method and its options.
        learning_rates: among which it chooses, from small to large; while the best is the first or the last, the next
            of the series is tried too.
        needs: what it needs for a subject and a task, such as a basis.
        drawn: a setting that takes the seed of the run, such as that of a random basis; one value for all without it.
    """

    name: str
    settings: Mapping[str, Any]
    learning_rates: tuple[float, ...]
    needs: Needs = lambda subject, task: {}
    drawn: str = ""

    def run(self, subject: Subject, task: str, learning_rate: float, seed: int) -> Run:
        """One tuning."""
        settings = {**self.settings, "learning_rate": learning_rate}
        if self.drawn:
            settings[self.drawn] = seed
        return subject.tune(task, seed, needs=self.needs(subject, task), **settings)


@dataclass(frozen=True)
class Contest:
    """Arms that are compared on one subject.

    Args:
        subject: the model and its tasks.
        arms: what is compared.
        selection_tasks: on whose selection examples, with the first seed, the learning rates are chosen.
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
        chosen_by_trial = tuple(arm for arm in self.arms if len(arm.learning_rates) > 1)
        trials = replace(self, arms=chosen_by_trial).trials(results)
        return trials + [run for _, run in self.counted(results)]

    def trials(self, results: Results) -> list[Run]:
        """Each arm at each of its rates on the selection tasks, with the first seed."""
        return [run for arm in self.arms for rate in self.tried_rates(arm, results) for run in self._at(arm, rate)]

    def selection_mean(self, arm: Arm, results: Results) -> float | None:
        """Mean score on the selection examples at the chosen rate; None until all trials are done."""
        rate = self.chosen_rate(arm, results)
        scores = [math.nan if rate is None else _selection_score(run, results) for run in self._at(arm, rate or 0.0)]
        return None if np.isnan(scores).any() else float(np.mean(scores))

    def counted(self, results: Results) -> Iterator[tuple[dict[str, Any], Run]]:
        """The runs at chosen rates, with their labels in tables, one seed of everything after another."""
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
    same = ("score", "seconds_per_step", "adapter_bytes", "precision")
    return {
        **{name: result[key] for name, key in named.items()},
        **{name: result[name] for name in same},
        "selection_score": result.get("selection_score", math.nan),
    }
