"""Image sets of the Hugging Face hub, most of them in VTAB, each from there or from a copy of its repository."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, Image

from spectralbasis.errors import InputError
from spectralbasis.study.messages import first_line
from spectralbasis.study.tasks.arrays import IMAGE, LABEL
from spectralbasis.study.tasks.task import Task, register_task


@dataclass(frozen=True)
class HubImages:
    """Where a set is on the hub, and what its columns are called there.

    `config` is the part of a set that has several. All have the splits `train` and `test`.
    """

    name: str
    repository: str
    image: str = "image"
    label: str = "label"
    config: str | None = None

    @property
    def folder(self) -> str:
        """What a copy's folder is called."""
        return self.repository.rpartition("/")[2]


HUB_IMAGES = (
    HubImages("CIFAR-100", "uoft-cs/cifar100", "img", "fine_label"),
    HubImages("SVHN", "ufldl-stanford/svhn", config="cropped_digits"),
    HubImages("DTD", "tanganke/dtd"),
    HubImages("EuroSAT", "tanganke/eurosat"),
    HubImages("RESISC45", "tanganke/resisc45"),
    HubImages("Pets", "timm/oxford-iiit-pet"),
)
"""Photographs, house numbers, textures, satellite images and breeds, most of them in VTAB (arXiv 1910.04867)."""


def load_hub_images(which: HubImages, data: Path | None) -> Task:
    """Load one of the sets from the hub where `data` is None, else from DATA or DATA/FOLDER, a copy of its repository.

    Images stay encoded until they are read.

    Raises:
        InputError: the set cannot be reached or read, a column or a split is missing, or Pillow, which decodes images,
            is not installed.
    """
    if find_spec("PIL") is None:
        raise InputError(f"{which.name} has encoded images, which Pillow decodes; pip install 'spectralbasis[images]'")
    place = which.repository if data is None else str(_copy_in(data, which))
    try:
        splits = datasets.load_dataset(place, which.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{which.name} cannot be loaded from {place} ({first_line(error)}); go online, or pass --data with the "
            f"parent of {which.folder}/, a copy of {which.repository} on the Hugging Face hub"
        ) from error
    train, test = (_columns(which, place, splits, split) for split in ("train", "test"))
    return Task(
        name=which.name,
        modality="image",
        kind="classification",
        inputs=(IMAGE,),
        label_names=tuple(train.features[LABEL].names),
        train=train,
        evaluation=test,
        evaluation_split="test",
    )


def _copy_in(data: Path, which: HubImages) -> Path:
    nested = data / which.folder
    return nested if nested.is_dir() else data


def _columns(which: HubImages, place: str, splits: datasets.DatasetDict, split: str) -> Dataset:
    if split not in splits:
        raise InputError(f"{place} has no split {split!r}; it has {', '.join(splits)}")
    rows = splits[split]
    for column, kind in ((which.image, Image), (which.label, ClassLabel)):
        if not isinstance(rows.features.get(column), kind):
            raise InputError(
                f"{place} has no column {column!r} of the type {kind.__name__}; its columns are "
                f"{', '.join(rows.column_names)}"
            )
    return rows.select_columns([which.image, which.label]).rename_columns(
        {old: new for old, new in ((which.image, IMAGE), (which.label, LABEL)) if old != new}
    )


for _which in HUB_IMAGES:
    register_task(_which.name, partial(load_hub_images, _which))
