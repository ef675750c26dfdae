"""CIFAR-10 from an archive of JPEG images."""

import io
import os
import sys
import tarfile

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from spectralbasis.errors import InputError
from spectralbasis.training import load_task


def jpeg(colour, size=32):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    content = io.BytesIO()
    image.new("RGB", (size, size), colour).save(content, "JPEG")
    return content.getvalue()


def write_archive(folder, members):
    file = folder / "cifar10_jpg.tar.xz"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:xz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def small_archive(folder):
    colours = {"train/bird/0.jpg": (255, 0, 0), "train/truck/0.jpg": (0, 0, 255), "test/airplane/0.jpg": (0, 255, 0)}
    return write_archive(folder, {name: jpeg(colour) for name, colour in colours.items()})


def test_images_are_decoded_with_their_class(tmp_path):
    small_archive(tmp_path / "cifar10_jpg")
    task = load_task("cifar-10", tmp_path)
    assert (task.num_labels, task.label_names[2], len(task.train), task.evaluation[0]["label"]) == (10, "bird", 2, 0)
    means = {row["label"]: row["image"].mean((1, 2)) for row in task.train}
    assert means[2] == pytest.approx([255, 0, 0], abs=3)
    assert means[9] == pytest.approx([0, 0, 255], abs=3)


def test_a_decoded_archive_is_not_decoded_again(tmp_path, private_cache, monkeypatch):
    small_archive(tmp_path)
    first = load_task("cifar10", tmp_path).train[:]["image"]
    assert list(private_cache.glob("images/*.safetensors"))
    monkeypatch.setattr("spectralbasis.training.image_tasks._decode", lambda file: pytest.fail("decoded again"))
    assert np.array_equal(load_task("cifar10", tmp_path).train[:]["image"], first)


def test_a_damaged_cache_is_made_again(tmp_path, private_cache):
    small_archive(tmp_path)
    first = load_task("cifar10", tmp_path).train[:]["image"]
    next(private_cache.glob("images/*.safetensors")).write_bytes(b"half a file")
    assert np.array_equal(load_task("cifar10", tmp_path).train[:]["image"], first)


def test_cached_images_that_are_not_those_of_the_archive_are_made_again(tmp_path, private_cache):
    small_archive(tmp_path)
    first = load_task("cifar10", tmp_path).train[:]["image"]
    file = next(private_cache.glob("images/*.safetensors"))
    with safe_open(file, framework="np") as stored:
        metadata = stored.metadata()
    save_file({name: 255 - array for name, array in load_file(file).items()}, file, metadata=metadata)
    assert np.array_equal(load_task("cifar10", tmp_path).train[:]["image"], first)
    file.unlink()
    os.mkfifo(file)
    assert np.array_equal(load_task("cifar10", tmp_path).train[:]["image"], first)


def test_members_elsewhere_are_left_out_and_nothing_is_unpacked(tmp_path):
    small_archive(tmp_path)
    other = write_archive(tmp_path / "other", {"../../escape.jpg": jpeg("red"), "train/bird/0.jpg": jpeg("red")})
    with pytest.raises(InputError, match="holds no images test/CLASS"):
        load_task("cifar10", other)
    assert not list(tmp_path.parent.glob("escape.jpg"))


def test_images_of_another_size_or_of_no_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"an image of size \(64, 64\); expected 32×32"):
        load_task("cifar10", write_archive(tmp_path, {"train/bird/0.jpg": jpeg("red", 64)}))
    with pytest.raises(InputError, match="an image that cannot be decoded"):
        load_task("cifar10", write_archive(tmp_path, {"train/bird/0.jpg": b"no image"}))


def test_an_archive_that_is_none_is_named(tmp_path):
    (tmp_path / "cifar10_jpg.tar.xz").write_bytes(b"\xfd7zXZ no archive")
    with pytest.raises(InputError, match="cannot be read as an archive"):
        load_task("cifar10", tmp_path)


def test_without_pillow_the_error_says_what_to_install(tmp_path, monkeypatch):
    file = write_archive(tmp_path, {"train/bird/0.jpg": b"never decoded"})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"CIFAR-10 needs the package pillow.*: pip install 'spectralbasis\[images\]'"):
        load_task("cifar10", file)


@pytest.mark.slow
@pytest.mark.data
def test_the_real_archive_is_read_whole(data_dir):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    task = load_task("cifar10", data_dir)
    assert (len(task.train), len(task.evaluation)) == (50_000, 10_000)
    assert np.bincount(task.evaluation[:]["label"]).tolist() == [1000] * 10
