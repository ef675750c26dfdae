"""The action `retention`: what a fully tuned model still does of its task once it was tuned to another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from spectralbasis.study.actions.inputs import halved_task, model_of
from spectralbasis.study.models.loading import LoadedModel, load_model
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.study.tasks.task import Task
from spectralbasis.study.training.evaluation import attach_adapter, score_task


def retention(run: Run, site: Site) -> Outcome:
    """Score a model on its own task, with its own head, before and after tuning to another changed its backbone.

    The model (a need, or a setting where no run makes it) has a head for the setting `task`; the need `adapter` was
    tuned from it to the setting `second_task` by any method, also as a whole model. `max_length` is for texts.

    Returns:
        `before` and `after`, means of the scores on both halves of the held-out examples.
    """
    place, length = model_of(run, site), run.settings.get("max_length", 64)
    first = load_model(place, halved_task(run.settings["task"], site), head="stored", max_length=length)
    before = _score(first)
    second = _tuned(place, site.needs["adapter"], halved_task(run.settings["second_task"], site), length)
    setattr(first.model, first.model.base_model_prefix, getattr(second, second.base_model_prefix))
    return Outcome({"before": before, "after": _score(first)})


def _tuned(place: str, tuned: Path, task: Task, length: int) -> Any:
    """The model for the second task, its adapters in place."""
    if (tuned / "config.json").is_file():
        return load_model(tuned, task, head="stored", max_length=length).model
    adapted = attach_adapter(load_model(place, task, max_length=length), tuned)
    return adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted


def _score(loaded: LoadedModel) -> float:
    task = loaded.task
    splits = [split for split in (task.evaluation, task.selection) if split is not None]
    halves = [replace(task, evaluation=split) for split in splits]
    scores = [score_task(loaded.model, half, loaded.collator, progress=False)[task.headline] for half in halves]
    return sum(scores) / len(scores)
