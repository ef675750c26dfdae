"""What finetuned checkpoints share, over all matrices: the entry `sharing` of `summary.json`."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pandas as pd
from typing_extensions import TypedDict

from spectralbasis.comparison.permutation import PermutationTest, permutation_test
from spectralbasis.comparison.statistics import FindingEntry, find, full_k, pair_interval
from spectralbasis.records import Count, Finite

_PAIR = ["tuned_a", "tuned_b"]
ONE_RUN = (
    "These are checkpoints of one training run. Each goes on from the one before, so that what they share says how "
    "far the run moved, and nothing about what tasks have in common."
)


class PairEntry(TypedDict):
    """What two checkpoints share, in the entry `sharing`; None where a number does not exist."""

    a: str
    b: str
    value: Finite | None
    null_mean: Finite | None
    effect: Finite | None
    base_overlap_a: Finite | None
    base_overlap_b: Finite | None
    update_cosine: Finite | None
    update_overlap: Finite | None
    update_overlap_haar: Finite | None
    same_task: bool | None


class PermutationEntry(TypedDict):
    """The fields of `PermutationTest`."""

    statistic: Finite
    same_task: Finite
    different_tasks: Finite
    p_value: Finite
    arrangements: Count
    exact: bool


class SharingEntry(FindingEntry):
    """The entry `sharing` of `summary.json`."""

    over: Literal["different tasks", "all", "same task", "one run"]
    note: str
    tasks: dict[str, str]
    ceiling: FindingEntry | None
    permutation: PermutationEntry | None
    pairs: list[PairEntry]


def sharing_findings(
    shared: pd.DataFrame, tasks: Mapping[str, str], earlier: Collection[str], seed: int
) -> dict[str, Any]:
    """The finding over pairs of checkpoints, each pair, the ceiling and the permutation test.

    The finding counts pairs of different tasks where tasks are known, else all pairs; of a training run only the last
    checkpoint counts, as the earlier ones are not independent of it.

    Args:
        shared: all rows of `sharing.parquet`.
        tasks: label → task; empty where tasks are not known.
        earlier: labels of checkpoints from which a later one of the same run went on.
        seed: of the bootstrap and of sampled permutations.
    """
    units = _units(shared)
    pairs = _pairs(units, shared, tasks)
    kind = [_kind(a, b, tasks, earlier) for a, b in zip(units["tuned_a"], units["tuned_b"], strict=True)]
    counted = next(one for one in ("different tasks", "all", "same task", "one run") if one in kind)
    same_task = units[[one == "same task" for one in kind]]
    return {
        **find(units[[one == counted for one in kind]], seed, pair_interval).to_dict(),
        "over": counted,
        "note": ONE_RUN if counted == "one run" else "",
        "tasks": dict(tasks),
        "ceiling": find(same_task, seed, pair_interval).to_dict() if len(same_task) else None,
        "permutation": _permutation(pairs, tasks, earlier, seed),
        "pairs": pairs,
    }


def sharing_methods(found: Mapping[str, Any]) -> str:
    """How sharing was measured and tested, for the methods paragraph; `found` is the entry `sharing`."""
    counted = {"different tasks": "those of different tasks", "same task": "all, which are of one task"}
    text = (
        f"Of every two of the finetuned checkpoints ({len(found['pairs'])} pairs; counted are "
        f"{counted.get(found['over'], 'all')}) the leading subspaces were held against pairs of independent draws; the "
        "error of the mean excess is the larger of the hierarchical bootstrap's (pairs outermost) and of the jackknife "
        "over checkpoints."
    )
    test = found["permutation"]
    if test is None:
        return text
    how = "all" if test["exact"] else "a seeded sample of"
    return f"{text} Task labels were permuted over {how} {test['arrangements']} arrangements."


def _kind(a: str, b: str, tasks: Mapping[str, str], earlier: Collection[str]) -> str:
    if a in earlier or b in earlier:
        return "one run"
    if not tasks:
        return "all"
    return "same task" if tasks[a] == tasks[b] else "different tasks"


def _units(shared: pd.DataFrame) -> pd.DataFrame:
    """One row per pair and matrix at its full k, left and right averaged; `tuned` numbers the pairs."""
    rows = shared[(shared["metric"] == "subspace_overlap") & (shared["k"] == full_k(shared))]
    values = ["value", "null_mean", "base_overlap_a", "base_overlap_b"]
    units = rows.groupby([*_PAIR, "layer", "matrix"], as_index=False, sort=False)[values].mean()
    return units.assign(tuned=units.groupby(_PAIR, sort=False).ngroup())


def _pairs(units: pd.DataFrame, shared: pd.DataFrame, tasks: Mapping[str, str]) -> list[dict[str, Any]]:
    """Means over matrices of each pair, with what its updates have in common."""
    means = units.groupby(_PAIR, sort=False)[["value", "null_mean", "base_overlap_a", "base_overlap_b"]].mean()
    means.insert(2, "effect", means["value"] - means["null_mean"])
    updates = shared[shared["metric"] == "update_overlap"]
    widest = updates[updates["k"] == updates.groupby([*_PAIR, "matrix"])["k"].transform("max")].groupby(_PAIR)
    means["update_cosine"] = shared[shared["metric"] == "update_cosine"].groupby(_PAIR)["value"].mean()
    means["update_overlap"] = widest["value"].mean()
    means["update_overlap_haar"] = widest["null_mean"].mean()
    return [
        {"a": a, "b": b}
        | {str(key): value if math.isfinite(value) else None for key, value in numbers.items()}
        | {"same_task": tasks[a] == tasks[b] if tasks else None}
        for (a, b), numbers in zip(means.index, means.to_dict("records"), strict=True)
    ]


def _permutation(
    pairs: list[dict[str, Any]], tasks: Mapping[str, str], earlier: Collection[str], seed: int
) -> dict[str, Any] | None:
    labels = [label for label in tasks if label not in earlier]
    excess = np.full((len(labels), len(labels)), math.nan)
    np.fill_diagonal(excess, 0)
    for pair in pairs:
        if pair["a"] in labels and pair["b"] in labels and pair["effect"] is not None:
            i, j = labels.index(pair["a"]), labels.index(pair["b"])
            excess[i, j] = excess[j, i] = pair["effect"]
    if len(labels) < 3 or np.isnan(excess).any():
        return None
    test: PermutationTest | None = permutation_test(excess, [tasks[label] for label in labels], seed)
    return None if test is None else asdict(test)
