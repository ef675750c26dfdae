"""Images and labels in memory as a `datasets.Dataset`, and the rows of one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Array3D, ClassLabel, Dataset, DatasetInfo, Features
from numpy.typing import ArrayLike, NDArray

from spectralbasis.errors import InputError

IMAGE = "image"
SIGNALS = "signals"
LABEL = "label"


def image_dataset(what: str, images: ArrayLike, labels: ArrayLike, label_names: Sequence[str]) -> Dataset:
    """A data set with the columns `image` (channels, height, width) and `label`, over the arrays' own memory.

    Images are of shape (N, height, width) or (N, height, width, channels), uint8 in [0, 255] or floats in [0, 1];
    labels are whole numbers below the number of label names. `what` is how errors call the data.

    Raises:
        InputError: a shape, a pixel or a label is not as above.
    """
    pixels = _checked_pixels(what, np.asarray(images))
    classes = _checked_labels(what, np.asarray(labels), len(pixels), len(label_names))
    kind = Array3D(shape=pixels.shape[1:], dtype=str(pixels.dtype))
    table = pa.table({IMAGE: _image_column(kind, pixels), LABEL: pa.array(classes)})
    features = Features({IMAGE: kind, LABEL: ClassLabel(names=list(label_names))})
    return Dataset(table, info=DatasetInfo(features=features)).with_format("numpy")


def batches(examples: Dataset, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a data set in order, `size` at a time; reading them one by one takes several times as long."""
    for start in range(0, len(examples), size):
        columns = examples[start : start + size]
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _checked_pixels(what: str, pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.ndim not in (3, 4) or not pixels.size:
        raise InputError(
            f"{what}: images of shape {pixels.shape}; expected (N, height, width) or (N, height, width, channels)"
        )
    if pixels.dtype.kind not in "biuf":
        raise InputError(f"{what}: pixels of type {pixels.dtype}; expected floats in [0, 1], or uint8 in [0, 255]")
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.float32)
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{what}: pixels from {low:g} to {high:g}; expected floats in [0, 1], or uint8 in [0, 255]"
            )
    pixels = pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1)
    return np.ascontiguousarray(pixels)


def _checked_labels(what: str, labels: NDArray[Any], examples: int, classes: int) -> NDArray[np.int64]:
    if labels.shape != (examples,):
        raise InputError(f"{what}: labels of shape {labels.shape} for {examples} images; give one label an image")
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"{what}: labels of type {labels.dtype}; expected whole numbers from 0 to {classes - 1}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise InputError(f"{what}: labels from {low} to {high}; expected 0 to {classes - 1}, one for each label name")
    return labels.astype(np.int64)


def _image_column(kind: Array3D, pixels: NDArray[Any]) -> pa.Array:
    """The pixels as nested Arrow lists over the array's own memory; `Dataset.from_dict` would copy each pixel."""
    column: pa.Array = pa.array(pixels.reshape(-1))
    for width in reversed(pixels.shape[1:]):
        offsets = np.arange(len(column) // width + 1, dtype=np.int64) * width
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column)
    return pa.ExtensionArray.from_storage(kind(), column)
