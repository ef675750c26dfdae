"""The action `retention`: what a fully tuned model still does of its task once an adapter for another was added."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectralbasis.study.actions.inputs import halved_task
from spectralbasis.study.evaluation import attach_adapter, score_task
from spectralbasis.study.models import LoadedModel, load_model
from spectralbasis.study.runs import Outcome, Run, Site
from spectralbasis.tuner.optimization import in_modules


def retention(run: Run, site: Site) -> Outcome:
    """Score a model on its own task, with its own head, before and after an adapter changed its backbone.

    The needs are `model`, tuned in full to the setting `task`, and `adapter`, trained on that model for the setting
    `second_task`; `max_length` is for texts.

    Returns:
        `before` and `after`, means of the scores on both halves of the held-out examples.
    """
    place, length = site.needs["model"], run.settings.get("max_length", 64)
    first = load_model(place, halved_task(run.settings["task"], site), head="stored", max_length=length)
    before = _score(first)
    second = load_model(place, halved_task(run.settings["second_task"], site), max_length=length)
    adapted: Any = attach_adapter(second, Path(site.needs["adapter"]))
    _take_backbone(first, adapted.merge_and_unload())
    return Outcome({"before": before, "after": _score(first)})


def _score(loaded: LoadedModel) -> float:
    task = loaded.task
    splits = [split for split in (task.evaluation, task.selection) if split is not None]
    halves = [replace(task, evaluation=split) for split in splits]
    scores = [score_task(loaded.model, half, loaded.collator, progress=False)[task.headline] for half in halves]
    return sum(scores) / len(scores)


@torch.no_grad()
def _take_backbone(loaded: LoadedModel, other: nn.Module) -> None:
    """Copy all parameters but the head's."""
    found = dict(other.named_parameters())
    for name, parameter in loaded.model.named_parameters():
        if not in_modules(name, loaded.head):
            parameter.copy_(found[name])
