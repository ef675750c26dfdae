"""What several actions read from a run: its task, its model, and how long texts are."""

from typing import Any

from spectralbasis.study.runs import Run, Site
from spectralbasis.study.tasks.data_folders import folder_of
from spectralbasis.study.tasks.task import Task, load_task

SPLIT_SEED = 0


def halved_task(name: str, site: Site) -> Task:
    """A task by its name, from its folder below the data folder, with a half of its held-out examples to select by.

    The halves are the same for every run.
    """
    return load_task(name, folder_of(name, site.data)).halved(SPLIT_SEED)


def model_of(run: Run, site: Site) -> str:
    """The model that the run starts from: the folder of its need `model`, else what its settings name."""
    found: Any = site.needs.get("model") or run.settings["model"]
    return str(found)
