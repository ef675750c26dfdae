"""Where a task's files lie below the one folder of all data sets."""

from pathlib import Path

from spectralbasis.errors import InputError
from spectralbasis.study.tasks.task import same_name

FOLDERS: dict[str, tuple[str, ...]] = {
    "glue": ("RTE", "MRPC", "CoLA", "STS-B", "SST-2", "QNLI", "QQP", "MNLI"),
    "mnist": ("MNIST",),
    "usps": ("USPS",),
    "fashion_mnist": ("Fashion-MNIST",),
    "cifar10_jpg": ("CIFAR-10",),
    "motionsense": ("MotionSense",),
    "english_novels": ("novels",),
    "wikitext2_shakespeare": ("Shakespeare", "WikiText-2"),
    "cifar100": ("CIFAR-100",),
    "svhn": ("SVHN",),
    "dtd": ("DTD",),
    "eurosat": ("EuroSAT",),
    "resisc45": ("RESISC45",),
    "oxford-iiit-pet": ("Pets",),
}
ON_HUB = ("glue", "cifar100", "svhn", "dtd", "eurosat", "resisc45", "oxford-iiit-pet")
"""Folders whose tasks come from the hub where they are absent."""


def folder_of(task_name: str, data: Path | None) -> Path | None:
    """The folder for `load_task`, where `data` holds those of all tasks.

    None for a task that has no folder there, such as the bundled digits or one that the hub has, and where `data` is
    None.
    """
    for folder, names in FOLDERS.items():
        if data is not None and any(same_name(task_name, name) for name in names):
            return None if folder in ON_HUB and not (data / folder).is_dir() else data / folder
    return None


def find_data_file(task_name: str, folder_name: str, file_name: str, data: Path | None) -> Path:
    """A data set's file, where `data` is the file, its folder or that folder's parent.

    Raises:
        InputError: no data were named, or the file is not there.
    """
    if data is None:
        raise InputError(f"the task {task_name} needs --data with the folder that holds {file_name}")
    places = (data, data / file_name, data / folder_name / file_name)
    for place in places:
        if place.is_file() and place.name == file_name:
            return place
    raise InputError(
        f"no {file_name} for the task {task_name}: looked for {places[1]} and {places[2]}; pass its folder"
    )
