"""Tasks on images: MNIST and its relatives from NumPy and HDF5 files, and scikit-learn's bundled digits.

Image sets of the Hugging Face hub, most of them in VTAB, each from there or from a copy of its repository.

CIFAR-10 from an archive of JPEG images, which are decoded once and kept.

Tasks on signals of motion sensors: MotionSense.
"""

import hashlib
import io
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Array2D, ClassLabel, Dataset, Features, Image
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from spectralbasis.databases import seal
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, cache_folder, checksum
from spectralbasis.training.data_files import find_data_file, read_h5, read_npz, tar_members
from spectralbasis.training.messages import first_line
from spectralbasis.training.tasks import IMAGE, LABEL, SIGNALS, Task, register_task

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


OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = 32
LARGEST = 100_000
"""Bytes of a JPEG: those of CIFAR-10 have about 1,000."""


def load_cifar10(data: Path | None) -> Task:
    """Ten kinds of objects in colour images of 32×32 pixels (Krizhevsky 2009), from `cifar10_jpg.tar.xz`.

    The decoded images are kept in the library's cache folder, by the archive's content.

    Raises:
        InputError: the archive is absent, damaged or holds other images, or Pillow, which decodes it, is not installed.
    """
    file = find_data_file("CIFAR-10", "cifar10_jpg", "cifar10_jpg.tar.xz", data)
    train, test = _kept(file)
    return Task.from_arrays("CIFAR-10", shuffled(train, str(file)), test, label_names=OBJECTS, evaluation_split="test")


def _kept(file: Path) -> tuple[Split, Split]:
    """The decoded archive, from the cache where it has been decoded before."""
    with file.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    kept = cache_folder() / "images" / f"{content}.safetensors"
    arrays = _from_cache(kept, content)
    if arrays is None:
        arrays = _decode(file)
        with suppress(InputError), atomic_path(kept) as temporary:  # a cache that cannot be written costs time only
            save_file(arrays, temporary, metadata={"seal": _seal(content, arrays)})
    return _splits(arrays)


def _from_cache(kept: Path, content: str) -> dict[str, Any] | None:
    """The images that this user decoded from an archive of this content; None where there are none."""
    try:
        if not stat.S_ISREG(kept.lstat().st_mode):
            return None
        with safe_open(kept, framework="np") as stored:
            sealed = (stored.metadata() or {}).get("seal")
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError):
        return None
    return arrays if sealed == _seal(content, arrays) else None


def _seal(content: str, arrays: Mapping[str, Any]) -> str:
    return seal(content, checksum(tensors={name: torch.from_numpy(array) for name, array in arrays.items()}))


def _splits(arrays: Any) -> tuple[Split, Split]:
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def _decode(file: Path) -> dict[str, Any]:
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    for split, label, content in _members(file):
        images[split].append(_pixels(file, content))
        labels[split].append(label)
    for split, found in images.items():
        if not found:
            raise InputError(f"{file} holds no images {split}/CLASS/NAME.jpg of {', '.join(OBJECTS)}")
    arrays = {f"x_{split}": np.stack(found) for split, found in images.items()}
    return {**arrays, **{f"y_{split}": np.array(found) for split, found in labels.items()}}


def _members(file: Path) -> Iterator[tuple[str, int, bytes]]:
    """Split, label and bytes of each member SPLIT/CLASS/NAME.jpg."""
    for name, content in tar_members(file, LARGEST):
        parts = PurePosixPath(name).parts
        if len(parts) == 3 and parts[0] in ("train", "test") and parts[1] in OBJECTS and parts[2].endswith(".jpg"):
            yield parts[0], OBJECTS.index(parts[1]), content


def _pixels(file: Path, content: bytes) -> NDArray[np.uint8]:
    try:
        Image: Any = import_module("PIL.Image")
    except ImportError as error:
        raise InputError(
            "CIFAR-10 comes as JPEG images, which Pillow decodes; pip install 'spectralbasis[images]'"
        ) from error
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.size != (SIZE, SIZE):
                raise InputError(f"{file} holds an image of size {image.size}; expected {SIZE}×{SIZE}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} holds an image that cannot be decoded: {first_line(error)}") from error


register_task("CIFAR-10", load_cifar10)


ACTIVITIES = ("downstairs", "upstairs", "sitting", "standing", "walking", "jogging")
GRAVITY = 9.8
HELD_OUT = 4
"""Every fourth user is held out."""


def load_motionsense(data: Path | None) -> Task:
    """Six activities from windows of 120 samples at 20 Hz: acceleration in g, then rotation in rad/s, on three axes.

    Users 3, 7, 11, … are held out, so that no user is in both parts (Malekzadeh et al., IoTDI 2019).

    Raises:
        InputError: the file is absent, lacks an array that it should hold, or holds another number of activities.
    """
    file = find_data_file("MotionSense", "motionsense", "motionsense_20hz_w120.npz", data)
    arrays = _read(file)
    held_out = arrays["user"] % HELD_OUT == HELD_OUT - 1
    if not 0 < held_out.sum() < len(held_out):
        raise InputError(f"{file} has users {np.unique(arrays['user'])}; expected some to train on and some held out")
    return Task(
        name="MotionSense",
        modality="signal",
        kind="classification",
        inputs=(SIGNALS,),
        label_names=ACTIVITIES,
        train=_dataset(arrays, ~held_out),
        evaluation=_dataset(arrays, held_out),
        evaluation_split="held-out users",
    )


def _read(file: Path) -> dict[str, NDArray[Any]]:
    arrays = read_npz(file, ("x", "activity", "user"))
    x, activity, user = arrays["x"], arrays["activity"], arrays["user"]
    if x.ndim != 3 or x.shape[2] != 6 or not x.size or not activity.shape == user.shape == x.shape[:1]:
        raise InputError(
            f"{file}: x of shape {x.shape} with activities of shape {activity.shape} and users of shape {user.shape}; "
            "expected (N, time, 6) and N of each"
        )
    if activity.dtype.kind not in "iu" or user.dtype.kind not in "iu":
        raise InputError(
            f"{file}: activity of type {activity.dtype}, user of type {user.dtype}; expected whole numbers"
        )
    if not np.isfinite(x).all():
        raise InputError(f"{file}: x has a NaN or infinite entry; expected finite ones")
    if not np.isin(activity, np.arange(len(ACTIVITIES))).all():
        raise InputError(f"{file}: activities {np.unique(activity)}; expected 0 to {len(ACTIVITIES) - 1}")
    return arrays


def _dataset(arrays: dict[str, NDArray[Any]], rows: NDArray[np.bool_]) -> Dataset:
    signals = arrays["x"][rows].astype(np.float32)
    signals[:, :, :3] /= GRAVITY
    features = Features(
        {SIGNALS: Array2D(shape=signals.shape[1:], dtype="float32"), LABEL: ClassLabel(names=list(ACTIVITIES))}
    )
    columns = {SIGNALS: list(signals), LABEL: arrays["activity"][rows].astype(int)}
    return Dataset.from_dict(columns, features=features).with_format("numpy")


register_task("MotionSense", load_motionsense)
