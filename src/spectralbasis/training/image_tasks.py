"""Tasks on images and signals: NumPy and HDF5 files, sets of the hub, CIFAR-10's JPEGs, scikit-learn's digits."""

import hashlib
import io
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.training.data_files import TaskRecord, find_data_file, first_line, read_h5, read_npz, tar_members
from spectralbasis.training.tasks import IMAGE, LABEL, SIGNALS, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Split = tuple[NDArray[Any], NDArray[Any]]

TEN_DIGITS = tuple(str(digit) for digit in range(10))
CLOTHES = ("top", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

IMAGE_FILES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "mnist": ("ten handwritten digits", "mnist.npz", TEN_DIGITS),
    "fashion_mnist": ("ten pieces of clothing", "fashion_mnist.npz", CLOTHES),
    "usps": ("ten handwritten digits of postcodes", "usps.h5", TEN_DIGITS),
}
"""Task, and its folder → description, file, label names."""


def load_image_file(name: str, data: Path | None) -> Task:
    """Load `mnist`, `fashion_mnist` or `usps` from its file; DATA is the file, its folder, or that folder's parent.

    Raises:
        InputError: the file is absent, or an array is missing in it.
    """
    _, file_name, label_names = IMAGE_FILES[name]
    file = find_data_file(name, name, file_name, data)
    if file.suffix == ".h5":
        arrays = read_h5(file, ("train/data", "train/target", "test/data", "test/target"))
        train, test = (
            (_as_squares(file, arrays[f"{split}/data"]), arrays[f"{split}/target"]) for split in ("train", "test")
        )
    else:
        train, test = _splits(read_npz(file, ("x_train", "y_train", "x_test", "y_test")))
    return Task.from_arrays(name, shuffled(train, str(file)), test, label_names=label_names, evaluation_split="test")


def _splits(arrays: Mapping[str, NDArray[Any]]) -> tuple[Split, Split]:
    return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


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


DIGITS_TASKS: dict[str, tuple[str, tuple[str, ...], Callable[[NDArray[Any], NDArray[np.int64]], Split]]] = {
    "digits": ("ten handwritten digits", TEN_DIGITS, lambda images, digits: (images, digits)),
    "digits-parity": ("even or odd", ("even", "odd"), lambda images, digits: (images, digits % 2)),
    "digits-larger-than-four": (
        "up to 4 or above", ("0 to 4", "5 to 9"), lambda images, digits: (images, (digits > 4).astype(int))
    ),
    "digits-rotated": (
        "ten digits, turned", TEN_DIGITS, lambda images, digits: (np.rot90(images, axes=(1, 2)), digits)
    ),
}  # fmt: skip
"""Task → description, label names, and what is made of scikit-learn's images and digits."""


def load_digits_task(name: str, data: Path | None) -> Task:
    """One of the tasks on scikit-learn's 1,797 digits of 8×8 pixels; all share one split, three quarters to train on.

    Raises:
        InputError: a data folder was given, which these tasks cannot use.
    """
    from sklearn.datasets import load_digits

    if data is not None:
        raise InputError(f"the task {name} is bundled with scikit-learn and reads no data; leave out --data {data}")
    _, label_names, transform = DIGITS_TASKS[name]
    bunch = load_digits()
    images, labels = shuffled(transform(bunch.images / bunch.images.max(), bunch.target), name)
    cut = 3 * len(labels) // 4
    train, held_out = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return Task.from_arrays(name, train, held_out, label_names=label_names, evaluation_split="held-out quarter")


@dataclass(frozen=True)
class HubImages:
    """A set on the hub, with the splits `train` and `test`: its repository and the names of its columns.

    `config` is the part of a set that has several parts.
    """

    name: str
    description: str
    repository: str
    image: str = "image"
    label: str = "label"
    config: str | None = None

    @property
    def folder(self) -> str:
        """What a copy's folder is called."""
        return self.repository.rpartition("/")[2]


HUB_IMAGES = (
    HubImages("CIFAR-100", "a hundred kinds of things", "uoft-cs/cifar100", "img", "fine_label"),
    HubImages("SVHN", "digits of house numbers", "ufldl-stanford/svhn", config="cropped_digits"),
    HubImages("DTD", "47 textures", "tanganke/dtd"),
    HubImages("EuroSAT", "ten uses of land", "tanganke/eurosat"),
    HubImages("RESISC45", "45 scenes from above", "tanganke/resisc45"),
    HubImages("Pets", "37 breeds of cats and dogs", "timm/oxford-iiit-pet"),
)
"""Photographs, house numbers, textures, satellite images and breeds, most of them in VTAB (arXiv 1910.04867)."""


def load_hub_images(which: HubImages, data: Path | None) -> Task:
    """Load one of the sets from the hub where `data` is None, else from DATA or DATA/FOLDER, a copy of its repository.

    Images stay encoded until they are read.

    Raises:
        InputError: the set cannot be reached or read, a column or a split is missing, or Pillow, which decodes images,
            is not installed.
    """
    import datasets

    require_extra("images", f"the task {which.name}")
    place = which.repository
    if data is not None:
        place = str(data / which.folder if (data / which.folder).is_dir() else data)
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


def _columns(which: HubImages, place: str, splits: "DatasetDict", split: str) -> "Dataset":
    from datasets import ClassLabel, Image

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
    from safetensors.numpy import save_file

    from spectralbasis.files import atomic_path, cache_folder

    file = find_data_file("CIFAR-10", "cifar10_jpg", "cifar10_jpg.tar.xz", data)
    with file.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    kept = cache_folder() / "images" / f"{content}.safetensors"
    arrays = _from_cache(kept, content)
    if arrays is None:
        arrays = _decode(file)
        with suppress(InputError), atomic_path(kept) as temporary:  # a cache that cannot be written costs time only
            save_file(arrays, temporary, metadata={"seal": _seal(content, arrays)})
    train, test = _splits(arrays)
    return Task.from_arrays("CIFAR-10", shuffled(train, str(file)), test, label_names=OBJECTS, evaluation_split="test")


def _from_cache(kept: Path, content: str) -> dict[str, Any] | None:
    """The images that this user decoded from an archive of this content; None where there are none."""
    from safetensors import SafetensorError, safe_open

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
    import torch

    from spectralbasis.databases import seal
    from spectralbasis.files import checksum

    return seal(content, checksum(tensors={name: torch.from_numpy(array) for name, array in arrays.items()}))


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
    require_extra("images", "the task CIFAR-10")
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if image.size != (SIZE, SIZE):
                raise InputError(f"{file} holds an image of size {image.size}; expected {SIZE}×{SIZE}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file} holds an image that cannot be decoded: {first_line(error)}") from error


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


def _dataset(arrays: dict[str, NDArray[Any]], rows: NDArray[np.bool_]) -> "Dataset":
    from datasets import Array2D, ClassLabel, Dataset, Features

    signals = arrays["x"][rows].astype(np.float32)
    signals[:, :, :3] /= GRAVITY
    features = Features(
        {SIGNALS: Array2D(shape=signals.shape[1:], dtype="float32"), LABEL: ClassLabel(names=list(ACTIVITIES))}
    )
    columns = {SIGNALS: list(signals), LABEL: arrays["activity"][rows].astype(int)}
    return Dataset.from_dict(columns, features=features).with_format("numpy")


IMAGE_TASKS = (
    *(
        TaskRecord(name, "images", description, partial(load_image_file, name), name)
        for name, (description, _, _) in IMAGE_FILES.items()
    ),
    *(
        TaskRecord(name, "images of scikit-learn", description, partial(load_digits_task, name))
        for name, (description, _, _) in DIGITS_TASKS.items()
    ),
    *(
        TaskRecord(
            which.name, "images", which.description, partial(load_hub_images, which), which.folder, which.repository
        )
        for which in HUB_IMAGES
    ),
    TaskRecord("CIFAR-10", "images", "ten animals and vehicles", load_cifar10, "cifar10_jpg"),
    TaskRecord("MotionSense", "signals", "six activities, from motion sensors", load_motionsense, "motionsense"),
)
