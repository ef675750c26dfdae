"""The page's tables: cells as text, with the value that they are sorted by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from spectralbasis.comparison.summary import Summary
from spectralbasis.report.measures import Headline, Measure
from spectralbasis.report.results import Tuning
from spectralbasis.report.sentences import number

_MEASURES = ("overlap_left", "overlap_right", "coverage_core", "step")
_STATISTICS = {"value": "observed", "null_mean": "null", "z": "z"}
_ABSENT = "–"


class Cell(NamedTuple):
    """What a cell shows, and the value it is sorted by (None sorts last)."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Column:
    """A column of the table of matrices that shows one statistic of one measure."""

    measure: str
    statistic: str
    heading: str
    digits: int
    scale: int


def matrix_columns(headline: Headline) -> list[tuple[str, list[Column]]]:
    """Groups of columns with their headings: for each measure what was observed, its null and z."""
    shown = [measure for measure in headline.measures if measure.key in _MEASURES]
    return [(measure.label + ", %" * measure.percent, _columns(measure, headline)) for measure in shown]


def _columns(measure: Measure, headline: Headline) -> list[Column]:
    scale = 100 if measure.percent else 1
    values = [name for name in ("value", "null_mean") if name in headline.grids[measure.key]]
    columns = [Column(measure.key, name, _STATISTICS[name], measure.digits, scale) for name in values]
    return columns + [Column(measure.key, "z", "z", 1, 1)] * ("z" in headline.grids[measure.key])


def matrix_rows(headline: Headline, columns: Sequence[Column], selection: int = 0) -> list[list[Cell]]:
    """One row per matrix: its name, layer, size and k, then the `columns` for one selection."""
    grids = [headline.grids[column.measure][column.statistic][selection] for column in columns]
    return [
        [
            Cell(row["matrix"], row["matrix"]),
            Cell(str(row["layer"]) if row["layer"] >= 0 else _ABSENT, row["layer"]),
            Cell(f"{row['m']} × {row['n']}", row["m"] * row["n"]),
            Cell(str(row["k"]), row["k"]),
            *(fixed(grid[place], column.digits, column.scale) for grid, column in zip(grids, columns, strict=True)),
        ]
        for place, row in enumerate(headline.matrices.to_dict("records"))
    ]


def fixed(value: Any, digits: int, scale: float = 1) -> Cell:
    """A number with so many decimals, scaled for showing only."""
    found = number(value)
    if found is None:
        return Cell(_ABSENT, None)
    return Cell(f"{found * scale:z.{digits}f}".replace("-", "−"), float(f"{found:.6g}"))


TUNING_HEADINGS = (
    "Task",
    "Method",
    "Metric",
    "Score",
    "Backbone parameters",
    "Share of the model, %",
    "Head parameters",
    "Adapter",
    "Seconds per step",
    "Seed",
)


def tuning_rows(tuning: Tuning) -> list[list[Cell]]:
    """One row per run, in the order of `TUNING_HEADINGS`."""
    return [
        [
            Cell(str(run["task"]), str(run["task"])),
            Cell(run["label"], run["label"]),
            Cell(str(run["metric"]), str(run["metric"])),
            fixed(run["score"], 4),
            _count(run["parameters_backbone"]),
            fixed(run["share_backbone"], 3, 100),
            _count(run["parameters_head"]),
            Cell(size(run["adapter_bytes"]), number(run["adapter_bytes"])),
            fixed(run["seconds_per_step"], 3),
            _count(run["seed"]),
        ]
        for run in tuning.rows.to_dict("records")
    ]


def _count(value: Any) -> Cell:
    found = number(value)
    return Cell(_ABSENT, None) if found is None else Cell(f"{int(found):,}", found)


def size(value: Any) -> str:
    """Bytes as a person reads them."""
    found = number(value)
    if found is None:
        return _ABSENT
    power = min(int(math.log(max(found, 1), 1000)), 4)
    return f"{found / 1000**power:.{0 if power == 0 else 1}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(value: Any) -> str:
    """Seconds as a person reads them."""
    found = number(value)
    if found is None:
        return _ABSENT
    if found < 60:
        return f"{found:.1f} s"
    minutes, seconds = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def settings(summary: Summary, null: str, matrices: int) -> list[tuple[str, str]]:
    """How the comparison was made, as names and values; what is empty is left out."""
    found = [
        ("Base", summary["base"]),
        ("Finetuned", ", ".join(summary["tuned"])),
        ("Matrices", matrices),
        ("Leading directions", leading(summary["leading"])),
        ("Null", null or "none drawn"),
        ("Draws per matrix", summary["draws"] if null else None),
        ("Seed", summary["seed"]),
        ("Time", duration(summary["seconds"])),
        ("Peak memory", size(summary["peak_rss_bytes"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def leading(rule: Any) -> str:
    """The rule that says how many directions lead."""
    if rule == "auto":
        return "64 of each matrix, or half of its smaller side where that is less"
    if rule == "mp":
        return "those above the Marchenko–Pastur edge of each matrix"
    if rule == "gd":
        return "those above the Gavish–Donoho threshold of each matrix"
    found = number(rule)
    if found is None:
        return "" if rule is None else str(rule)
    if 0 < found < 1:
        return f"{100 * found:g} % of each matrix’s directions"
    return f"{found:g} of each matrix (all of them where it has fewer)"
