"""Checkpoints of one training run, told by their names, and how the findings move from step to step."""

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import pandas as pd
from typing_extensions import TypedDict

from spectralbasis.records import Count, Finite

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
    runs: Mapping[str, Mapping[int, str]], per_tuned: Mapping[str, Any], table: pd.DataFrame
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
