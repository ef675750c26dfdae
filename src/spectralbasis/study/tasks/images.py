"""Tasks on images: MNIST and its relatives from NumPy and HDF5 files, and scikit-learn's bundled digits."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from spectralbasis.errors import InputError
from spectralbasis.study.tasks.data_files import read_h5, read_npz
from spectralbasis.study.tasks.data_folders import find_data_file
from spectralbasis.study.tasks.task import Task, register_task

Split = tuple[NDArray[Any], NDArray[Any]]

TEN_DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

IMAGE_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mnist": ("mnist.npz", TEN_DIGITS),
    "fashion_mnist": ("fashion_mnist.npz", CLOTHES),
    "usps": ("usps.h5", TEN_DIGITS),
}


def load_image_file(name: str, data: Path | None) -> Task:
    """Load `mnist`, `fashion_mnist` or `usps` from its file; DATA is the file, its folder, or that folder's parent.

    Raises:
        InputError: the file is absent, or lacks an array that it should hold.
    """
    file_name, label_names = IMAGE_FILES[name]
    file = find_data_file(name, name, file_name, data)
    train, test = _read_h5(file) if file.suffix == ".h5" else _read_npz(file)
    return Task.from_arrays(name, shuffled(train, str(file)), test, label_names=label_names, evaluation_split="test")


def _read_npz(file: Path) -> tuple[Split, Split]:
    arrays = read_npz(file, ("x_train", "y_train", "x_test", "y_test"))
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def _read_h5(file: Path) -> tuple[Split, Split]:
    arrays = read_h5(file, ("train/data", "train/target", "test/data", "test/target"))
    squares = {split: _as_squares(file, arrays[f"{split}/data"]) for split in ("train", "test")}
    return (squares["train"], arrays["train/target"]), (squares["test"], arrays["test/target"])


def _as_squares(file: Path, pixels: NDArray[Any]) -> NDArray[Any]:
    """Flat images as (N, width, width)."""
    width = math.isqrt(pixels.shape[-1]) if pixels.ndim == 2 else 0
    if pixels.ndim != 2 or width * width != pixels.shape[1]:
        raise InputError(f"{file}: images of shape {pixels.shape}; expected (N, width²), one flat square a row")
    return pixels.reshape(len(pixels), width, width)


def shuffled(split: Split, source: str) -> Split:
    """The examples in a fixed random order: MNIST's files here are sorted by class.

    Raises:
        InputError: there is not one label for each image.
    """
    images, labels = split
    if not images.ndim or labels.shape != images.shape[:1]:
        raise InputError(f"{source}: labels of shape {labels.shape} for images of shape {images.shape}; give one each")
    order = np.random.default_rng(0).permutation(len(labels))
    return images[order], labels[order]


Transform = Callable[[NDArray[Any], NDArray[np.int64]], Split]

DIGITS_TASKS: dict[str, tuple[tuple[str, ...], Transform]] = {
    "digits": (TEN_DIGITS, lambda images, digits: (images, digits)),
    "digits-parity": (("even", "odd"), lambda images, digits: (images, digits % 2)),
    "digits-larger-than-four": (("0 to 4", "5 to 9"), lambda images, digits: (images, (digits > 4).astype(int))),
    "digits-rotated": (TEN_DIGITS, lambda images, digits: (np.rot90(images, axes=(1, 2)), digits)),
}


def load_digits_task(name: str, data: Path | None) -> Task:
    """One of the tasks on scikit-learn's 1,797 digits of 8×8 pixels; all share one split, three quarters to train on.

    Raises:
        InputError: a data folder was given, which these tasks cannot use.
    """
    if data is not None:
        raise InputError(f"the task {name} is bundled with scikit-learn and reads no data; leave out --data {data}")
    label_names, transform = DIGITS_TASKS[name]
    bunch = load_digits()
    images, labels = shuffled(transform(bunch.images / bunch.images.max(), bunch.target), name)
    cut = 3 * len(labels) // 4
    train, held_out = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return Task.from_arrays(name, train, held_out, label_names=label_names, evaluation_split="held-out quarter")


for _name in IMAGE_FILES:
    register_task(_name, partial(load_image_file, _name))
for _name in DIGITS_TASKS:
    register_task(_name, partial(load_digits_task, _name))
