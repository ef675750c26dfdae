"""The tasks with a name: one `TaskRecord` each, the source of help, errors and the places of data sets."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from spectralbasis.errors import InputError
from spectralbasis.extras import listed_by_group, require_extra
from spectralbasis.training.data_files import TaskLoader, TaskRecord
from spectralbasis.training.image_tasks import IMAGE_TASKS
from spectralbasis.training.tasks import Task
from spectralbasis.training.text_tasks import TEXT_TASKS


def task_key(name: str) -> str:
    """The name without what does not count in it: case, hyphens and underscores."""
    return name.lower().replace("-", "").replace("_", "")


TABLES = "text_classification"
"""Folder of the tasks that are CSV files, one folder each."""


def load_csv_task(name: str, data: Path | None) -> Task:
    """A classification of texts from `train.csv` and `test.csv`, with the columns `text` and `label`.

    Raises:
        InputError: no data were named, a file is missing, or a row cannot be read.
    """
    from spectralbasis.training.own_tasks import Wanted, own_task  # imports torch, which --help can do without

    if data is None:
        raise InputError(f"the task {name} needs --data with the folder that holds {name}/train.csv")
    places = (data / name, data / TABLES / name, data)
    folder = next((place for place in places if (place / "train.csv").is_file()), None)
    if folder is None:
        raise InputError(f"no {name} in {data}: looked for train.csv in {', '.join(map(str, places))}; pass its folder")
    wanted = Wanted("classification", ("text",), "label")
    return replace(own_task(folder / "train.csv", folder / "test.csv", wanted=wanted), name=name)


CSV_TASKS = tuple(
    TaskRecord(name, "CSV files", description, partial(load_csv_task, name), TABLES)
    for name, description in (
        ("movie_reviews", "is an opinion of a film good or bad"),
        ("mpqa", "is a phrase of a news text in favour or against"),
        ("trec", "what does a question ask for, in six classes"),
        ("sst5", "how good is an opinion of a film, in five classes"),
        ("tweets_emotion", "which of four emotions does a tweet show"),
        ("tweets_irony", "is a tweet ironic"),
        ("tweets_hate", "is a tweet hateful"),
        ("tweets_offensive", "is a tweet offensive"),
    )
)
BUILT_IN = (*TEXT_TASKS, *CSV_TASKS, *IMAGE_TASKS)
TASKS: dict[str, TaskRecord] = {task_key(record.name): record for record in BUILT_IN}


def register_task(
    name: str,
    load: TaskLoader,
    *,
    group: str = "registered",
    description: str = "",
    folder: str | None = None,
    hub: str | None = None,
) -> None:
    """Make a task known by name, to `tune`, `evaluate` and their `--task`; a known name is replaced.

    Args:
        name: of the task; case, hyphens and underscores do not count when it is asked for.
        load: gets the folder of data that the user named, or None, and returns the `Task`.
        group: under which lists name it.
        description: what is asked, in a few words.
        folder: of its data, below a folder that holds those of all tasks.
        hub: id of the data set on the Hugging Face hub that is taken where no folder is given.

    Examples:
        >>> import numpy as np
        >>> def load(data):
        ...     images, labels = np.eye(8)[None].repeat(4, 0), np.array([0, 1, 0, 1])
        ...     return Task.from_arrays("diagonals", (images, labels), (images, labels))
        >>> register_task("diagonals", load, description="even or odd examples")
        >>> len(load_task("Diagonals").train)
        4
    """
    TASKS[task_key(name)] = TaskRecord(name, group, description, load, folder, hub)


def task_names() -> tuple[str, ...]:
    """The names that `load_task` knows.

    Examples:
        >>> {"SST-2", "mnist", "digits"} <= set(task_names())
        True
    """
    return tuple(record.name for record in TASKS.values())


def record_of(name: str) -> TaskRecord | None:
    """The record of a task, if one of this name is known."""
    return TASKS.get(task_key(name))


def tasks_in_words() -> str:
    """The names of all tasks, by group."""
    return listed_by_group((record.group, record.name) for record in TASKS.values())


def load_task(name: str, data: Path | str | None = None) -> Task:
    """Load a task by its name.

    Args:
        name: of the task, in any case and with or without hyphens.
        data: folder or file of its data; None takes GLUE's tasks and some sets of images from the hub, and suits the
            tasks that come with scikit-learn.

    Raises:
        InputError: the name is not known, the data are absent or not in the expected layout, or the extra `tune` is
            not installed.

    Examples:
        >>> task = load_task("digits")
        >>> task.train.num_rows, task.headline
        (1347, 'accuracy')
    """
    require_extra("tune", f"the task {name}")
    record = record_of(name)
    if record is None:
        raise InputError(f"unknown task {name!r}; the known ones are {tasks_in_words()}")
    if data is not None and not Path(data).exists():
        raise InputError(f"the data folder {data} does not exist; pass --data with the folder that holds {record.name}")
    return record.load(None if data is None else Path(data))


def folder_of(task_name: str, data: Path | None) -> Path | None:
    """The folder for `load_task`, where `data` holds those of all tasks.

    None for a task that has no folder there, such as the digits or one that the hub has, and where `data` is None.
    """
    record = record_of(task_name)
    if record is None or record.folder is None or data is None:
        return None
    folder = data / record.folder
    return None if record.hub and not folder.is_dir() else folder
