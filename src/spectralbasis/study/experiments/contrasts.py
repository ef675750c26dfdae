"""Paired comparisons of arms, adjusted for how many there are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from spectralbasis.comparison.statistics import Interval
from spectralbasis.study.experiments.claims import as_family, conclude, conclude_equal
from spectralbasis.study.measures.statistics import paired_comparison
from spectralbasis.study.verdicts import Claim


@dataclass(frozen=True)
class Contrast:
    """One arm, or kind of arm, against another.

    Args:
        name: of the claim.
        text: the claim, true where `better` scores above `worse` by more than minus the margin.
        better, worse: values of the compared column.
        would_change: what would have to be seen for another verdict.
        margin: how far below still counts as no worse.
    """

    name: str
    text: str
    better: str
    worse: str
    would_change: str
    margin: float = 0.0


def differences(scores: pd.DataFrame, column: str, better: str, worse: str, by: Sequence[str]) -> pd.DataFrame:
    """Pairs of scores that differ in `column` alone: the columns of `by`, `better` and `worse`."""
    wide = scores[scores[column].isin([better, worse])].pivot_table(index=list(by), columns=column, values="score")
    for name in (better, worse):
        if name not in wide:
            wide[name] = np.nan
    pairs = wide.dropna(subset=[better, worse]).reset_index()
    return pairs.rename(columns={better: "better", worse: "worse"})


def compare_pairs(pairs: pd.DataFrame) -> Interval:
    """The mean difference; tasks of a subject are the units, since seeds and cells of one are no further witnesses."""
    return paired_comparison(pairs["better"], pairs["worse"], pairs["subject"] + " / " + pairs["task"])


def conclude_family(
    contrasts: Sequence[Contrast], scores: pd.DataFrame, column: str, by: Sequence[str], unit: str = "score"
) -> list[Claim]:
    """A claim for each contrast, with Holm's p-values over all of them.

    Args:
        contrasts: what is compared.
        scores: with the columns `subject`, `task`, `score`, `column` and those of `by`.
        column: whose values are compared.
        by: what pairs have in common.
        unit: of the effects.

    Returns:
        Claims whose p-values are adjusted; those that are not below 0.05 then are undecided, except that a margin is
        judged by the interval alone.
    """
    claims = [_conclude(one, differences(scores, column, one.better, one.worse, by), unit) for one in contrasts]
    return [
        replace(judged, verdict=claim.verdict) if contrast.margin else judged
        for contrast, claim, judged in zip(contrasts, claims, as_family(claims), strict=True)
    ]


def conclude_equality(
    contrasts: Sequence[Contrast], scores: pd.DataFrame, column: str, by: Sequence[str], within: float
) -> list[Claim]:
    """For each contrast, the claim that its arms' mean scores differ by less than `within`; see `conclude_equal`."""
    claims = []
    for one in contrasts:
        pairs = differences(scores, column, one.better, one.worse, by)
        name = f"{one.better} equals {one.worse}"
        text = f"The mean scores of `{one.better}` and `{one.worse}` differ by less than {within:g}."
        found = compare_pairs(pairs)
        claims.append(conclude_equal(name, text, found, within=within, unit="score", runs=2 * len(pairs)))
    return claims


def _conclude(contrast: Contrast, pairs: pd.DataFrame, unit: str) -> Claim:
    found = compare_pairs(pairs)
    shifted = replace(found, low=found.low + contrast.margin, high=found.high + contrast.margin)
    judged = conclude(
        contrast.name, contrast.text, shifted, unit=unit, would_change=contrast.would_change, runs=2 * len(pairs)
    )
    return replace(judged, low=found.low, high=found.high)
