"""CIFAR-10 from an archive of JPEG images, which are decoded once and kept."""

import hashlib
import io
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spectralbasis.checksums import checksum
from spectralbasis.databases import seal
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.study.messages import first_line
from spectralbasis.study.tasks.data_files import tar_members
from spectralbasis.study.tasks.data_folders import find_data_file
from spectralbasis.study.tasks.images import Split, shuffled
from spectralbasis.study.tasks.task import Task, register_task
from spectralbasis.triplets import cache_folder

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
