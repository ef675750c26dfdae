"""MotionSense from its NumPy archive."""

import numpy as np
import pytest

from spectralbasis.errors import InputError
from spectralbasis.training import load_task

FILE = "motionsense_20hz_w120.npz"


def write_motionsense(folder, **changes):
    """Two windows of each of eight users, whose signals all equal the user's number."""
    users = np.repeat(np.arange(8), 2)
    x = np.broadcast_to(users[:, None, None], (16, 40, 6)).astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / FILE, **{"x": x, "activity": users % 6, "user": users, "trial": users, **changes})


@pytest.mark.parametrize("place", [".", "motionsense"])
def test_no_user_is_in_both_parts(tmp_path, place):
    write_motionsense(tmp_path / place)
    task = load_task("MotionSense", tmp_path)
    train, held_out = (set(split[:]["signals"][:, 0, 5]) for split in (task.train, task.evaluation))
    assert (train, held_out) == ({0, 1, 2, 4, 5, 6}, {3, 7})
    assert task.train[4]["label"] == 2


def test_acceleration_is_in_units_of_gravity_and_rotation_as_it_was(tmp_path):
    write_motionsense(tmp_path, x=np.full((16, 40, 6), 9.8))
    signals = load_task("MotionSense", tmp_path).train[0]["signals"]
    assert signals.shape == (40, 6)
    assert signals[:, :3] == pytest.approx(1)
    assert signals[:, 3:] == pytest.approx(9.8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": np.zeros((16, 40, 5))}, r"x of shape \(16, 40, 5\)"),
        ({"user": np.arange(3)}, "activities of shape .16,. and users of shape .3,."),
        ({"activity": np.full(16, 6)}, r"activities \[6\]; expected 0 to 5"),
        ({"user": np.zeros(16, int)}, r"users \[0\]; expected some to train on"),
        ({"x": np.array([{}])}, "x is of type object, expected numbers"),
    ],
)
def test_a_file_in_another_layout_says_what_is_wrong(tmp_path, changes, message):
    write_motionsense(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_task("MotionSense", tmp_path)


def test_a_missing_array_is_named(tmp_path):
    np.savez(tmp_path / FILE, x=np.zeros((1, 2, 6)))
    with pytest.raises(InputError, match="has no array activity"):
        load_task("MotionSense", tmp_path)


@pytest.mark.data
def test_the_real_file_is_read_whole(data_dir):
    task = load_task("MotionSense", data_dir)
    assert len(task.train) + len(task.evaluation) == 4532
    assert 0.15 < len(task.evaluation) / 4532 < 0.35
    assert task.train[0]["signals"].shape == (120, 6)
    assert set(task.evaluation[:]["label"]) == set(range(6))
    resting = task.train[:]["signals"][task.train[:]["label"] == 3][:, :, :3]
    assert np.linalg.norm(resting, axis=2).mean() == pytest.approx(1, abs=0.05)
