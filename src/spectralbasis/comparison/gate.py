"""Conditions on the results of a comparison, with which a command fails: `overlap<0.9`, `verdict=contradicted`.

A condition names a metric of the table, or a fact of the summary, and what it is compared with. Of a metric, the value
is the mean over matrices; `min:` and `max:` before the name take the smallest or largest matrix. A condition is tested
for each finetuned checkpoint, and holds if it holds for one. A value that is missing or NaN counts as held.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened

if TYPE_CHECKING:
    import pandas as pd

METRICS = (
    "matched_cosine",
    "assigned_cosine",
    "max_cosine",
    "subspace_overlap",
    "overlap_haar",
    "wedin_bound",
    "coverage_diagonal",
    "coverage_core",
    "coverage_left",
    "coverage_right",
    "singular_value_base",
    "singular_value_tuned",
    "singular_value_shift",
    "update_norm",
    "update_norm_relative",
    "stable_rank_base",
    "stable_rank_tuned",
    "stable_rank_update",
    "effective_rank_base",
    "effective_rank_tuned",
    "effective_rank_update",
    "intruders",
    "trailing_overlap",
    "trailing_coverage",
)
"""The metrics of the table."""
_OF_EVERY_K = frozenset(
    {"subspace_overlap", "overlap_haar", "wedin_bound", "trailing_overlap", "trailing_coverage"}
    | {name for name in METRICS if name.startswith("coverage_")}
)
"""Metrics that the table has for several k; the value for all leading directions counts."""
SHORT = {"overlap": "subspace_overlap", "coverage": "coverage_core"}
"""Short names of the two metrics that verdicts are of."""
COUNTS = ("unpaired", "failed")
"""How many matrices found no partner, and how many pairs could not be measured."""
VERDICTS = ("supported", "contradicted", "undecided")
OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_FORM = re.compile(r"\s*(?:(mean|min|max)\s*:\s*)?([a-z_]+)\s*(<=|>=|<|>|=)\s*([^<>=\s]+)\s*", re.ASCII)


@dataclass(frozen=True)
class Condition:
    """One condition.

    Attributes:
        text: as it was typed.
        aggregate: "mean", "min" or "max" over matrices.
        name: a metric, "verdict", or one of `COUNTS`.
        sign: a key of `OPERATORS`.
        bound: a number, or a verdict.
    """

    text: str
    aggregate: str
    name: str
    sign: str
    bound: float | str


def parse_condition(text: str) -> Condition:
    """Read a condition such as `overlap<0.9`, `min:coverage_core<0.2`, `verdict=contradicted` or `unpaired>0`.

    Raises:
        InputError: it is none; the message lists the names.

    Examples:
        >>> parse_condition("overlap<0.9").name, parse_condition("max: intruders >= 1").aggregate
        ('subspace_overlap', 'max')
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(
            f"{shortened(repr(text), 80)} is no condition; write NAME<NUMBER, such as overlap<0.9; {_names()}"
        )
    aggregate, name, sign, bound = found.groups()
    name = SHORT.get(name, name)
    if name == "verdict":
        if sign != "=" or bound not in VERDICTS or aggregate:
            raise InputError(f"{shortened(repr(text), 80)} is no condition; write verdict= and {' or '.join(VERDICTS)}")
        return Condition(text, "", name, sign, bound)
    if name not in METRICS and name not in COUNTS:
        raise InputError(f"{shortened(repr(text), 80)} has the unknown name {shortened(name, 40)}; {_names()}")
    if aggregate and name in COUNTS:
        raise InputError(f"{shortened(repr(text), 80)}: {name} is one number; write {name}{sign}{shortened(bound, 20)}")
    try:
        number = float(bound)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{shortened(repr(text), 80)} compares with {shortened(bound, 20)}, expected a number")
    return Condition(text, aggregate or "mean", name, sign, number)


def _names() -> str:
    short = ", ".join(f"{one} (for {long})" for one, long in SHORT.items())
    return f"names are {', '.join(METRICS)}, {short}, {', '.join(COUNTS)} and verdict"


def check_askable(conditions: Sequence[Condition], *, trailing: bool, null: bool) -> None:
    """Raise InputError where the settings of a comparison leave nothing that a condition could be tested on."""
    for condition in conditions:
        if condition.name.startswith("trailing_") and not trailing:
            raise InputError(f"{condition.text!r} needs the trailing directions: add --trailing")
        if condition.name == "verdict" and not null:
            raise InputError(
                f"{condition.text!r} needs a null, without which every verdict is undecided: leave out --null none"
            )


def held(conditions: Sequence[Condition], table: "pd.DataFrame", summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each condition that holds, with the value and the checkpoint.

    Where a pair of matrices could not be measured, as one that holds NaN, every condition on a metric counts as held.

    Args:
        conditions: what to test.
        table: rows of the comparison, see `metrics.Row`.
        summary: content of `summary.json`.
    """
    return [sentence for condition in conditions for sentence in _test(condition, table, summary)]


def _test(condition: Condition, table: "pd.DataFrame", summary: Mapping[str, Any]) -> list[str]:
    if condition.name == "verdict":
        found = {"all": summary, **summary["per_tuned"]} if len(summary["per_tuned"]) > 1 else {"": summary}
        return [
            f"{condition.text} holds: the verdict on {measure.replace('_', ' ')}{_of(label)} is {condition.bound}"
            for label, findings in found.items()
            for measure in ("stability", "coverage", "trailing_stability", "trailing_coverage")
            if measure in findings and _judged(findings[measure]) and findings[measure]["verdict"] == condition.bound
        ]
    failed = {label: len(names) for label, names in summary.get("failed", {}).items()}
    counts = {"unpaired": sum(one["matrices"] for one in summary["unpaired"]), "failed": sum(failed.values())}
    if condition.name in counts:
        value = counts[condition.name]
        return [f"{condition.text} holds: {condition.name} is {value}"] if _compare(condition, value) else []
    return [
        f"{condition.text} holds{_of(label, several=len(summary['tuned']) > 1)}: {reason}"
        for label in summary["tuned"]
        if (reason := _reason(condition, table[table["tuned"] == label], failed.get(label, 0)))
    ]


def _judged(finding: Mapping[str, Any]) -> bool:
    """Whether there is a verdict: what was measured has none where its null keeps it."""
    return finding["value"] is None or finding["null_mean"] is not None


def _reason(condition: Condition, rows: "pd.DataFrame", failed: int) -> str:
    """Why a condition on a metric holds for one checkpoint; empty where it does not."""
    if failed:
        return f"{failed} pairs of matrices could not be measured, so the {condition.name} of the checkpoint is unknown"
    from spectralbasis.comparison.statistics import full_k  # with SciPy, which a wrong condition does not wait for

    wanted = rows["metric"] == condition.name
    if condition.name in _OF_EVERY_K:
        wanted &= rows["k"] == full_k(rows)
    rows = rows[wanted]
    values = rows.groupby("matrix", sort=False)["value"].agg(lambda one: one.mean(skipna=False))
    if values.empty or values.isna().any():
        where = f" of {shortened(values[values.isna()].index[0])}" if len(values) else ""
        return f"{condition.name}{where} has no value, which counts as a failure"
    value = float(values.agg(condition.aggregate))
    if not _compare(condition, value):
        return ""
    if condition.aggregate == "mean":
        return f"the mean {condition.name} over {len(values)} matrices is {value:.6g}"
    name = values.idxmin() if condition.aggregate == "min" else values.idxmax()
    return (
        f"the {condition.aggregate} {condition.name} over {len(values)} matrices is {value:.6g}, of {shortened(name)}"
    )


def _compare(condition: Condition, value: float) -> bool:
    return OPERATORS[condition.sign](value, float(condition.bound))


def _of(label: str, *, several: bool = True) -> str:
    return f" of {shortened(label)}" if label and several else ""
