"""What finetuned checkpoints of one base share beyond chance, and the course of training runs.

`shared_rows` measures one matrix between two checkpoints, `sharing_findings` makes the entry `sharing` of
`summary.json`, and `trajectories` the entry `trajectory` from the checkpoints of one run.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from spectralbasis.checkpoints import Matrix
from spectralbasis.comparison.metrics import Measurements, SharedRow, leading_grid, overlaps
from spectralbasis.comparison.nulls import HAAR
from spectralbasis.comparison.rotations import Rotations, shared_overlap
from spectralbasis.comparison.statistics import (
    FindingEntry,
    against_haar,
    against_moments,
    against_null,
    against_unrelated,
    find,
    full_k,
    pair_interval,
    permutation_test,
)
from spectralbasis.linalg import LeadingSVD, cross_cosines, leading_svd, overlaps_by_k
from spectralbasis.linalg.row_blocks import MatrixLike
from spectralbasis.records import Count, Finite

if TYPE_CHECKING:
    import pandas as pd

UPDATE_DIRECTIONS = 8
"""How many leading directions of an update are compared with those of another."""
Pair = tuple[str, str]
"""Labels of two finetuned checkpoints, in the order in which they were given."""


@dataclass(frozen=True)
class Frames:
    """What is kept of one finetuned matrix until all its partners are measured: k×(m+n) numbers, and as many a draw.

    Attributes:
        content: hash of the matrix.
        tuned: its leading triplets.
        draws: those of the base under each draw of the null for this matrix; empty where none was needed.
        rotations: what the null in closed form gives for the base's vectors; empty where it does not hold.
        update: those of ΔW, at most `UPDATE_DIRECTIONS`.
        base_overlaps: subspace overlaps of the base with `tuned`.
    """

    content: str
    tuned: LeadingSVD
    draws: tuple[LeadingSVD, ...]
    rotations: Rotations
    update: LeadingSVD
    base_overlaps: Measurements


def update_directions(update: MatrixLike, values: Tensor, base_norm: float) -> LeadingSVD:
    """Leading triplets of `ΔW`: `UPDATE_DIRECTIONS` of them, or fewer where its rank is lower.

    What lies below the rounding of float32 weights has no direction of its own.

    Args:
        update: ΔW, (m, n).
        values: its singular values.
        base_norm: `‖W0‖_F`.
    """
    m, n = update.shape
    rounding = torch.finfo(torch.float32).eps * base_norm * (m**-0.5 + n**-0.5)
    rank = int(torch.count_nonzero(values > rounding))
    return leading_svd(update, min(UPDATE_DIRECTIONS, max(rank, 1)))


def shared_rows(pair: Pair, matrix: Matrix, a: Frames, b: Frames, update_cosine: float, null: str) -> list[SharedRow]:
    """All measurements of one matrix between two checkpoints; swapping them changes nothing but `base_overlap`.

    Args:
        pair: their labels.
        matrix: the base matrix.
        a: frames of the first.
        b: frames of the second.
        update_cosine: `⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)`.
        null: name of the null; empty where there is none.
    """
    place = (*pair, matrix.name, matrix.layer, matrix.kind, *matrix.shape)
    if a.content != b.content:
        paired = list(zip(a.draws, b.draws, strict=True))
    else:  # equal matrices have equal draws, so each is paired with the other's next one
        paired = list(zip(a.draws, b.draws[1:] + b.draws[:1], strict=True)) if len(a.draws) > 1 else []
    draws = [overlaps(one, other) for one, other in paired]
    closed = bool(a.rotations and b.rotations)
    source = "closed form" if closed else "draws" if draws else ""
    rows = []
    for key, value in overlaps(a.tuned, b.tuned).items():
        metric, side, k, _ = key
        if closed:
            number = ("left", "right").index(side)
            fit = against_moments(value, *shared_overlap(a.rotations[k][number], b.rotations[k][number], k))
        else:
            fit = against_null(value, np.array([draw[key] for draw in draws]))
        row = SharedRow(*place, k, metric, side, value, null if source else "", **asdict(fit), null_from=source)
        rows.append(replace(row, base_overlap_a=a.base_overlaps[key], base_overlap_b=b.base_overlaps[key]))
    whole = asdict(against_unrelated(update_cosine, matrix.shape))
    rows.append(SharedRow(*place, a.tuned.S.numel(), "update_cosine", "both", update_cosine, HAAR.name, **whole))
    most = min(a.update.S.numel(), b.update.S.numel())
    sides = {
        "left": cross_cosines(a.update.U[:, :most], b.update.U[:, :most]),
        "right": cross_cosines(a.update.Vh[:most].T, b.update.Vh[:most].T),
    }
    for (side, cosines), size in zip(sides.items(), matrix.shape, strict=True):
        by_k = overlaps_by_k(cosines).tolist()
        for k in leading_grid(most):
            unrelated = asdict(against_haar(by_k[k - 1], size, k))
            rows.append(SharedRow(*place, k, "update_overlap", side, by_k[k - 1], HAAR.name, **unrelated))
    return rows


_PAIR = ["tuned_a", "tuned_b"]
ONE_RUN = (
    "These are checkpoints of one training run. Each continues the one before, so what they share shows how far the "
    "run moved, not what tasks have in common."
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
    shared: "pd.DataFrame", tasks: Mapping[str, str], earlier: Collection[str], seed: int
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
    counted = {"different tasks": "those of different tasks", "same task": "all, because all have one task"}
    text = (
        f"For every pair of finetuned checkpoints ({len(found['pairs'])} pairs; the mean is over "
        f"{counted.get(found['over'], 'all')}) the overlap of the leading subspaces was compared with two "
        "independent updates under the null. The error of the mean excess is the larger one of the hierarchical "
        "bootstrap (pairs outermost) and the jackknife over checkpoints."
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


def _units(shared: "pd.DataFrame") -> "pd.DataFrame":
    """One row per pair and matrix at its full k, left and right averaged; `tuned` numbers the pairs."""
    rows = shared[(shared["metric"] == "subspace_overlap") & (shared["k"] == full_k(shared))]
    values = ["value", "null_mean", "base_overlap_a", "base_overlap_b"]
    units = rows.groupby([*_PAIR, "layer", "matrix"], as_index=False, sort=False)[values].mean()
    return units.assign(tuned=units.groupby(_PAIR, sort=False).ngroup())


def _pairs(units: "pd.DataFrame", shared: "pd.DataFrame", tasks: Mapping[str, str]) -> list[dict[str, Any]]:
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
    """The permutation test over task labels; None where it is not possible."""
    labels = [label for label in tasks if label not in earlier]
    excess = np.full((len(labels), len(labels)), math.nan)
    np.fill_diagonal(excess, 0)
    for pair in pairs:
        if pair["a"] in labels and pair["b"] in labels and pair["effect"] is not None:
            i, j = labels.index(pair["a"]), labels.index(pair["b"])
            excess[i, j] = excess[j, i] = pair["effect"]
    if len(labels) < 3 or np.isnan(excess).any():
        return None
    test = permutation_test(excess, [tasks[label] for label in labels], seed)
    return None if test is None else asdict(test)


_WEIGHTS = re.compile(r"\.(safetensors|pt|pth|bin|ckpt)$")
_STEP = re.compile(r"((?P<run>.+?)[-_.])??(checkpoint|ckpt|global_step|step|iter)[-_]?(?P<step>\d+)", re.IGNORECASE)
_SHOWN = ("value", "null_mean", "effect", "ci_low", "ci_high")


class PointEntry(TypedDict):
    """One claim at one step of a run; None where a number does not exist."""

    value: Finite | None
    null_mean: Finite | None
    effect: Finite | None
    ci_low: Finite | None
    ci_high: Finite | None


class StepEntry(TypedDict):
    """One step of a run."""

    step: Count
    tuned: str
    stability: PointEntry
    coverage: PointEntry
    update_norm_relative: Finite | None


class RunEntry(TypedDict):
    """One run in the entry `trajectory` of `summary.json`."""

    run: str
    points: list[StepEntry]


def parse_step(label: str) -> int | None:
    """The training step that the last component of a path names (`checkpoint-200`, `rte_step_200.pt`), else None."""
    found = _STEP.fullmatch(_WEIGHTS.sub("", PurePath(label).name))
    return int(found["step"]) if found else None


def training_runs(sources: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Runs of which several steps are at hand: name → step → label, steps in ascending order.

    Args:
        sources: label → path or name of a finetuned checkpoint; a file may lie in the folder that names the step.
    """
    runs: dict[str, dict[int, str]] = {}
    for label, source in sources.items():
        path = PurePath(source)
        named = path if parse_step(path.name) is not None else path.parent
        step = parse_step(named.name)
        if step is not None:
            runs.setdefault(_run_path(named), {})[step] = label
    several = {path: dict(sorted(steps.items())) for path, steps in runs.items() if len(steps) > 1}
    short = [PurePath(path).name for path in several]
    names = short if len(set(short)) == len(short) and all(short) else list(several)
    return dict(zip(names, several.values(), strict=True))


def _run_path(named: PurePath) -> str:
    found = _STEP.fullmatch(_WEIGHTS.sub("", named.name))
    return str(named.parent / (found["run"] or "")) if found else str(named)


def trajectories(
    runs: Mapping[str, Mapping[int, str]], per_tuned: Mapping[str, Any], table: "pd.DataFrame"
) -> list[dict[str, Any]]:
    """Stability, coverage and relative size of the update at each step of each run.

    Args:
        runs: as `training_runs` gives them.
        per_tuned: label → its findings, as in `summary.json`.
        table: all rows of the comparison.
    """
    sizes = table[table["metric"] == "update_norm_relative"].groupby("tuned")["value"].mean()
    return [
        {
            "run": run,
            "points": [
                {
                    "step": step,
                    "tuned": label,
                    **{claim: {key: finding[key] for key in _SHOWN} for claim, finding in per_tuned[label].items()},
                    "update_norm_relative": float(sizes[label]) if label in sizes else None,
                }
                for step, label in steps.items()
                if label in per_tuned
            ],
        }
        for run, steps in runs.items()
    ]
