"""What an experiment concludes: claims with effects and verdicts, and the tables and figures that show why."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go

VERDICTS = ("supported", "contradicted", "undecided")


@dataclass(frozen=True)
class Claim:
    """One claim, held against the runs.

    Args:
        name: short and stable, such as `leading above scrambled`.
        text: the claim as a sentence that could be false.
        verdict: one of `VERDICTS`.
        effect: what was observed, in `unit`; NaN where nothing was.
        low, high: its 95 % interval.
        p_value: two-sided, against no effect.
        unit: of the effect, such as `accuracy` or `share of the update`.
        would_change: what would have to be observed for another verdict.
        runs: how many finished runs it rests on.
    """

    name: str
    text: str
    verdict: str
    effect: float
    low: float
    high: float
    p_value: float
    unit: str
    would_change: str
    runs: int

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict={self.verdict!r} of {self.name}; expected one of {', '.join(VERDICTS)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; None where a number does not exist."""
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class Findings:
    """All that an experiment shows: its claims, small tables by title, figures by title, and a note."""

    claims: Sequence[Claim] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    figures: Mapping[str, go.Figure] = field(default_factory=dict)
    note: str = ""
