"""The action `tune`: one model, one task, one method, scored on both halves of the held-out examples."""

import math
from collections.abc import Mapping
from typing import Any

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.measures.trajectories import TrajectoryCallback
from spectralbasis.study.methods import BASIS_FILE, METHODS
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.training.penalties import UpdatePenalty
from spectralbasis.study.training.results import TuneResult
from spectralbasis.study.training.tuning import tune as tune_model

OWN_SETTINGS = ("model", "task", "measure", "penalty")


def tune(run: Run, site: Site) -> Outcome:
    """Tune, and leave the tuned model or adapter in the folder of the run.

    The settings are the keyword arguments of `spectralbasis.study.tune`, with the task by name, `measure`, those of
    `TrajectoryCallback`, and `penalty`, those of `UpdatePenalty`. The needs may be `model`, instead of the setting;
    `basis`, whose folder holds a basis file; `start`, an adapter from whose numbers training starts; and `source_0`,
    `source_1`, … to be fused.

    Returns:
        The scores, counts and costs; the measurements are the trajectory, where one was asked for.
    """
    options = {name: value for name, value in run.settings.items() if name not in OWN_SETTINGS}
    if "basis" in site.needs:
        options["basis"] = str(site.needs["basis"] / BASIS_FILE)
    sources = sorted(role for role in site.needs if role.startswith("source_"))
    measure: Mapping[str, Any] | None = run.settings.get("measure")
    trajectory = None if measure is None else TrajectoryCallback(**{"seed": run.seed, **measure})
    model = model_of(run, site)
    result = tune_model(
        model,
        task=halved_task(run.settings["task"], site),
        output=site.folder,
        start=site.needs.get("start"),
        sources=[site.needs[role] for role in sources],
        seed=run.seed,
        callbacks=[*([] if trajectory is None else [trajectory]), *_penalties(run)],
        progress=False,
        **options,
    )
    return Outcome({**_facts(result), **_distance(model, result)}, None if trajectory is None else trajectory.table())


def _penalties(run: Run) -> list[UpdatePenalty]:
    return [UpdatePenalty(**run.settings["penalty"])] if "penalty" in run.settings else []


def _facts(result: TuneResult) -> dict[str, Any]:
    facts = result.to_dict()
    return {name: value for name, value in facts.items() if name not in ("output", "model", "settings", "versions")}


def _distance(model: str, result: TuneResult) -> dict[str, float]:
    """How far a whole model has moved, `‖ΔW‖_F / ‖W0‖_F` over all its weight matrices; nothing for an adapter."""
    if METHODS[result.method].writes != "model":
        return {}
    base, tuned = (logical_matrices(open_checkpoint(place))[0] for place in (model, result.output))
    squares = [_squares(base[name].read(), tuned[name].read()) for name in base.keys() & tuned.keys()]
    moved, size = (math.fsum(column) for column in zip(*squares, strict=True))
    return {"update_norm_relative": math.sqrt(moved / size)}


def _squares(W0: Any, W1: Any) -> tuple[float, float]:
    if W0.shape != W1.shape:
        return 0.0, 0.0
    return float((W1 - W0).square().sum()), float(W0.square().sum())
