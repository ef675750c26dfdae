"""Tasks on images from arrays, files and scikit-learn."""

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from spectralbasis.errors import InputError
from spectralbasis.training import Task, load_task


def pixels_of(split):
    return split[:]["image"]


def write_npz(file, examples=30, **changes):
    """Images whose pixels all equal their class, sorted by class."""
    labels = np.sort(np.arange(examples) % 10)
    images = np.repeat(labels, 36).reshape(-1, 6, 6).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{"x_train": images, "y_train": labels, "x_test": images[:5], "y_test": labels[:5], **changes})
    return file


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 1, 3]), st.booleans())
def test_arrays_come_back_as_they_were_with_channels_first(examples, height, width, channels, whole):
    shape = (examples, height, width) if channels is None else (examples, height, width, channels)
    images = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    if whole:
        images = (255 * images).astype(np.uint8)
    labels = np.arange(examples)
    task = Task.from_arrays("task", (images, labels), (images, labels))
    expected = images[:, None] if channels is None else np.moveaxis(images, -1, 1)
    assert np.array_equal(pixels_of(task.train), expected)
    assert list(task.train["label"]) == list(labels)
    assert task.label_names == tuple(str(label) for label in labels)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8)), [0, 1], r"images of shape \(2, 8\)"),
        (np.zeros((0, 8, 8)), [], r"images of shape \(0, 8, 8\)"),
        (np.zeros((2, 8, 8)), [0], r"labels of shape \(1,\) for 2 images"),
        (np.zeros((2, 8, 8)), [0.5, 1.0], "labels of type float64"),
        (np.zeros((2, 8, 8)), [0, -1], "labels from -1 to 0; expected 0 to 1"),
        (np.full((2, 8, 8), 16.0), [0, 1], r"pixels from 16 to 16; expected floats in \[0, 1\]"),
        (np.full((2, 8, 8), np.nan), [0, 1], "pixels from nan to nan"),
    ],
)
def test_arrays_that_are_no_images_and_labels_are_refused(images, labels, message):
    fine = (np.zeros((1, 8, 8)), [0])
    with pytest.raises(InputError, match=f"shapes, evaluation examples: {message}"):
        Task.from_arrays("shapes", fine, (images, labels), label_names=("a", "b"))


@pytest.mark.parametrize("place", ["mnist.npz", "mnist/mnist.npz"])
def test_npz_is_read_and_shuffled_with_images_and_labels_together(tmp_path, place):
    write_npz(tmp_path / place)
    task = load_task("MNIST", tmp_path)
    labels = np.array(task.train["label"])
    assert sorted(labels) == sorted(np.arange(30) % 10)
    assert not np.array_equal(labels, np.sort(labels))
    assert np.array_equal(pixels_of(task.train)[:, 0, 0, 0], labels)
    assert (len(task.evaluation), task.evaluation_split, task.num_labels) == (5, "test", 10)


def test_the_file_itself_may_be_named(tmp_path):
    assert len(load_task("fashion-mnist", write_npz(tmp_path / "fashion_mnist.npz")).train) == 30


def test_h5_holds_flat_square_images(tmp_path):
    images = np.random.default_rng(0).uniform(size=(4, 16)).astype(np.float32)
    with h5py.File(tmp_path / "usps.h5", "w") as file:
        for split in ("train", "test"):
            file[f"{split}/data"], file[f"{split}/target"] = images, np.arange(4, dtype=np.int32)
    task = load_task("usps", tmp_path)
    assert np.array_equal(pixels_of(task.evaluation), images.reshape(4, 1, 4, 4))


def test_a_missing_file_or_array_is_named(tmp_path):
    with pytest.raises(InputError, match="mnist needs --data"):
        load_task("mnist")
    with pytest.raises(InputError, match=r"no mnist\.npz for the task mnist: looked for"):
        load_task("mnist", tmp_path)
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 4, 4)))
    with pytest.raises(InputError, match=r"mnist\.npz has no array y_train"):
        load_task("mnist", tmp_path)
    with h5py.File(tmp_path / "usps.h5", "w") as file:
        file["train/data"] = np.zeros((2, 16))
    with pytest.raises(InputError, match=r"usps\.h5 has no array train/target"):
        load_task("usps", tmp_path)


@pytest.mark.parametrize(("name", "file"), [("mnist", "mnist.npz"), ("usps", "usps.h5")])
def test_a_damaged_file_is_named(tmp_path, name, file):
    (tmp_path / file).write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(InputError, match=f"{file} cannot be read"):
        load_task(name, tmp_path)


def test_an_archive_that_would_run_code_is_refused(tmp_path):
    write_npz(tmp_path / "mnist.npz", y_train=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(InputError, match=r"mnist\.npz: y_train is of type object, expected numbers"):
        load_task("mnist", tmp_path)


def test_the_digits_tasks_share_one_split_and_relabel_it():
    digits, parity, larger, rotated = (
        load_task(name) for name in ("digits", "digits-parity", "digits-larger-than-four", "digits-rotated")
    )
    labels = np.array(digits.train["label"])
    assert (len(digits.train), len(digits.evaluation)) == (1347, 450)
    assert np.array_equal(parity.train["label"], labels % 2)
    assert np.array_equal(larger.train["label"], labels > 4)
    upright, turned = pixels_of(digits.evaluation), pixels_of(rotated.evaluation)
    assert np.array_equal(np.rot90(upright, axes=(2, 3)), turned)
    assert np.array_equal(digits.evaluation["label"], rotated.evaluation["label"])
    both = np.sort(np.concatenate([pixels_of(digits.train), upright]).reshape(1797, -1).sum(1))
    assert both == pytest.approx(np.sort(load_digits().data.sum(1) / 16))


def test_digits_refuse_a_data_folder(tmp_path):
    with pytest.raises(InputError, match="bundled with scikit-learn"):
        load_task("digits", tmp_path)
