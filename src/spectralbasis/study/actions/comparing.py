"""The action `compare`: finetuned models of one base, held against it and against each other."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from spectralbasis.comparison.engine import compare as compare_checkpoints
from spectralbasis.study.actions.inputs import model_of
from spectralbasis.study.runs import Outcome, Run, Site

_FINDINGS = ("stability", "coverage")


def compare(run: Run, site: Site) -> Outcome:
    """Measure what finetuned models did to their base, and what each two of them share.

    The needs are `tuned_0`, `tuned_1`, …, and `model`, the base, unless it is a setting. The settings are `tasks`, what
    each was tuned to, in their order, and `leading`, `draws` and `null` as for `spectralbasis.compare`.

    Returns:
        `stability` and `coverage` over all, `sharing` over pairs of different tasks with its `ceiling` and
        `permutation` test; the measurements are a row for each pair: `a` and `b` are numbers of finetuned models,
        `task_a` and `task_b`, `base_null_a` and `base_null_b` (the base's overlap with scrambled updates of each), and
        what `summary()["sharing"]["pairs"]` holds.
    """
    settings = dict(run.settings)
    tasks, base = settings.pop("tasks"), model_of(run, site)
    settings.pop("model", None)
    tuned = [str(site.needs[f"tuned_{number}"]) for number in range(len(tasks))]
    summary = compare_checkpoints(base, tuned, tasks=tasks, seed=run.seed, **settings).summary()
    result: dict[str, Any] = {name: summary[name] for name in _FINDINGS}
    sharing = summary.get("sharing")
    if sharing is None:
        return Outcome(result)
    result["sharing"] = {name: found for name, found in sharing.items() if name not in ("pairs", "tasks")}
    return Outcome(result, _pairs(summary, tasks))


def _pairs(summary: Mapping[str, Any], tasks: list[str]) -> pd.DataFrame:
    """The pairs with numbers in place of labels, which name folders of this machine."""
    labels, pairs = summary["tuned"], pd.DataFrame(summary["sharing"]["pairs"])
    chance = [summary["per_tuned"][label]["stability"]["null_mean"] for label in labels]
    for side in ("a", "b"):
        pairs[side] = [labels.index(label) for label in pairs[side]]
        pairs[f"task_{side}"] = [tasks[number] for number in pairs[side]]
        pairs[f"base_null_{side}"] = [chance[number] for number in pairs[side]]
    return pairs
