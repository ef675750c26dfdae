"""The text of the page: findings in sentences, table cells, settings, and effects on a common scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from spectralbasis.checkpoints.matching import share_text
from spectralbasis.comparison.summary import ClaimEntry, Summary
from spectralbasis.report.results import Headline, Tuning

Claim = Literal["stability", "coverage"]
CLAIMS: tuple[Claim, ...] = ("stability", "coverage")
_SPACE = "\N{NO-BREAK SPACE}"
_ABSENT = "–"
QUESTIONS: dict[Claim, str] = {
    "stability": "Do the leading directions stay where they were?",
    "coverage": "Does the update act along them?",
}

_UNJUDGED: dict[Claim, str] = {
    "stability": "a small update alone gives a high overlap",
    "coverage": "a null is needed to know the expected share",
}


class _Words(NamedTuple):
    headline: str
    reading: str
    meaning: str


_WORDS: dict[tuple[Claim, str], _Words] = {
    ("stability", "supported"): _Words(
        "Finetuning turned the leading singular directions less than a random update of the same size would",
        "turned less than by chance",
        "So the leading directions turned {turned} less than by chance.",
    ),
    ("stability", "contradicted"): _Words(
        "Finetuning turned the leading singular directions more than a random update of the same size would",
        "turned more than by chance",
        "So the leading directions turned {turned} more than by chance.",
    ),
    ("stability", "undecided"): _Words(
        "The turn of the leading singular directions does not differ measurably from that of a random update of the "
        "same size",
        "no difference from chance found",
        "So the stability seen here does not differ measurably from that of any update of this size.",
    ),
    ("coverage", "supported"): _Words(
        "these directions contain more of the update than expected by chance",
        "more than by chance",
        "So the update prefers the leading directions: they contain {times} times as much as expected by chance.",
    ),
    ("coverage", "contradicted"): _Words(
        "these directions contain less of the update than expected by chance",
        "less than by chance",
        "So the update avoids the leading directions: they contain {times} times as much as expected by chance.",
    ),
    ("coverage", "undecided"): _Words(
        "the share of the update in these directions does not differ measurably from chance",
        "no difference from chance found",
        "So there is no evidence that the update prefers or avoids the leading directions.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One claim's numbers; None where the comparison has none (without a null there is no effect)."""

    claim: Claim
    value: float | None
    null_mean: float | None
    effect: float | None
    ci_low: float | None
    ci_high: float | None
    p_value: float | None
    verdict: str
    note: str = ""

    @classmethod
    def read(cls, claim: Claim, entry: ClaimEntry) -> "Finding":
        """The finding of one `stability` or `coverage` entry of `summary.json`."""
        return cls(
            claim,
            value=entry["value"],
            null_mean=entry["null_mean"],
            effect=entry["effect"],
            ci_low=entry["ci_low"],
            ci_high=entry["ci_high"],
            p_value=entry["p_value"],
            verdict=entry["verdict"],
            note=entry.get("note", ""),
        )

    @property
    def has_null(self) -> bool:
        """Whether the value was compared with a null."""
        return self.null_mean is not None and self.effect is not None

    @property
    def words(self) -> _Words:
        """What the verdict is called."""
        return _WORDS[self.claim, self.verdict]


def number(value: Any) -> float | None:
    """`value` as a finite float, else None."""
    try:
        converted = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return converted if math.isfinite(converted) else None


def headline(stability: Finding, coverage: Finding, share: float = 1.0) -> str:
    """The page's first sentence: both verdicts, and their share of the model where that is not all of it."""
    if not (stability.has_null or coverage.has_null):
        return "There is no null, so nothing below can be compared with chance."
    link = "and" if stability.verdict == coverage.verdict else "but"
    said = f"{stability.words.headline}, {link} {coverage.words.headline}."
    if not coverage.has_null:
        said = f"{stability.words.headline}."
    if share >= 1:
        return said
    return f"Of {share_text(share)} of the model: {said[0].lower()}{said[1:]}"


def explain(finding: Finding, scope: str, step: str = "a random update of the same size") -> list[str]:
    """One claim in sentences: what was observed, what the null gives, how sure that is, and what it means.

    Args:
        finding: the claim's numbers.
        scope: what the numbers are averaged over.
        step: a draw of the null in a few words.
    """
    stability = finding.claim == "stability"
    value, null_mean = (amount(finding.claim, number) for number in (finding.value, finding.null_mean))
    if stability:
        observed = f"The leading subspaces before and after finetuning overlap by {value} (1 is unchanged)"
    else:
        observed = (
            f"The core spanned by the leading left and right directions holds {value} of the update’s squared norm"
        )
    said = [f"{observed}, averaged over {scope}."]
    if not finding.has_null:
        return [*said, f"There is no null for it, so the claim cannot be judged: {_UNJUDGED[finding.claim]}."]
    sure = [] if finding.ci_low is None else [f"95{_SPACE}% interval {interval(finding)}"]
    if finding.p_value is not None:
        sure.append(p_phrase(finding.p_value))
    leaves = f"{step[0].upper()}{step[1:]} leaves" if stability else "The share expected by chance is"
    effect = f"{difference(finding.claim, finding.effect)}{'' if stability else ' percentage points'}"
    brackets = f" ({', '.join(sure)})" if sure else ""
    said.append(f"{leaves} {null_mean}: the effect is {effect}{brackets}.")
    if finding.value is None or not finding.null_mean:
        return [*said, finding.words.reading]
    room = 1 - finding.null_mean
    turned = f"{100 * abs(finding.value - finding.null_mean) / room:.0f}{_SPACE}%" if room > 0 else "no"
    return [*said, finding.words.meaning.format(turned=turned, times=f"{finding.value / finding.null_mean:.2g}")]


def reading(finding: Finding) -> str:
    """One claim in a few words."""
    return finding.words.reading if finding.has_null else "there is no null"


def amount(claim: Claim, value: float | None) -> str:
    """`value` as its claim is spoken of: an overlap in [0, 1], a coverage in percent."""
    if value is None:
        return _ABSENT
    return f"{value:.4f}" if claim == "stability" else f"{_percent(value)}{_SPACE}%"


def difference(claim: Claim, value: float | None) -> str:
    """A difference of two amounts, signed; of coverages in percentage points, without the unit."""
    if value is None:
        return _ABSENT
    decimals = 6 if 0 < abs(value) < 5e-5 else 4
    text = f"{value:+.{decimals}f}" if claim == "stability" else f"{'+' if value >= 0 else ''}{_percent(value)}"
    return text.replace("-", "−")


def interval(finding: Finding) -> str:
    """The 95 % interval of the effect."""
    if finding.ci_low is None or finding.ci_high is None:
        return _ABSENT
    return " to ".join(difference(finding.claim, end) for end in (finding.ci_low, finding.ci_high))


def p_value(value: float | None) -> str:
    """A p-value to two significant digits, never as zero."""
    if value is None:
        return _ABSENT
    return f"<{_SPACE}0.001" if value < 0.001 else f"{value:.2g}"


def p_phrase(value: float) -> str:
    """A p-value with its sign, such as "p = 0.01"."""
    text = p_value(value)
    return f"p{_SPACE}{text}" if text.startswith("<") else f"p{_SPACE}={_SPACE}{text}"


def _percent(value: float) -> str:
    digits = 1 if abs(value) >= 0.1 else 2 if abs(value) >= 0.001 else 3
    return f"{100 * value:.{digits}f}"


_MEASURES = ("overlap_left", "overlap_right", "coverage_core", "step")
_STATISTICS = {"value": "observed", "null_mean": "null", "z": "z"}


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
    groups = []
    for measure in headline.measures:
        if measure.key in _MEASURES:
            grids, scale = headline.grids[measure.key], 100 if measure.percent else 1
            found = [name for name in _STATISTICS if name in grids]
            looks = {name: (1, 1) if name == "z" else (measure.digits, scale) for name in found}
            columns = [Column(measure.key, name, _STATISTICS[name], *looks[name]) for name in found]
            groups.append((measure.label + ", %" * measure.percent, columns))
    return groups


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
        ("Null", null or "none"),
        ("Null of the overlap", _null_from(summary["null_from"])),
        ("Draws per matrix", (summary["draws"] or None) if null else None),
        ("Seed", summary["seed"]),
        ("Time", duration(summary["seconds"])),
        ("Peak memory", size(summary["peak_rss_bytes"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _null_from(counts: Mapping[str, int]) -> str:
    """In how many matrices the null has a closed form and in how many it was drawn."""
    return ", ".join(
        f"{source} in {count} {'matrix' if count == 1 else 'matrices'}" for source, count in counts.items()
    )


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


@dataclass(frozen=True)
class Track:
    """Where a row's effect, interval and the null's zero stand, in percent of the scale; None where there is none."""

    zero: float
    effect: float | None = None
    low: float | None = None
    high: float | None = None


def tracks(findings: Sequence[Finding]) -> list[Track]:
    """One track per finding; all share a scale that holds zero and every interval."""
    ends = [end for finding in findings for end in (finding.effect, finding.ci_low, finding.ci_high) if end is not None]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    pad = 0.08 * (high - low) or 1.0
    low, high = low - pad, high + pad

    def place(value: float | None) -> float | None:
        return None if value is None else round(100 * (value - low) / (high - low), 2)

    zero = round(100 * (0.0 - low) / (high - low), 2)
    return [Track(zero, place(f.effect), place(f.ci_low), place(f.ci_high)) for f in findings]
