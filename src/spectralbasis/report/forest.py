"""Effects with their intervals on one common scale, drawn by the page with plain boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

from spectralbasis.report.sentences import Finding


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
