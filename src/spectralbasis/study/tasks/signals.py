"""Tasks on signals of motion sensors: MotionSense."""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Array2D, ClassLabel, Dataset, Features
from numpy.typing import NDArray

from spectralbasis.errors import InputError
from spectralbasis.study.tasks.arrays import LABEL, SIGNALS
from spectralbasis.study.tasks.data_files import read_npz
from spectralbasis.study.tasks.data_folders import find_data_file
from spectralbasis.study.tasks.task import Task, register_task

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
