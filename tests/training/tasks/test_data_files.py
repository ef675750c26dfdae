"""Data files are measured before they are unpacked, and lead nowhere else."""

import io
import os
import tarfile
import zipfile

import h5py
import numpy as np
import pytest

from spectralbasis.errors import InputError
from spectralbasis.training import data_files
from spectralbasis.training.data_files import read_h5, read_npz, read_text, tar_members


def npy(array):
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def zipped(file, *members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.ones((3, 2), "int8")), np.bool_(1)]
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_they_were_saved(tmp_path, array, save):
    save(tmp_path / "a.npz", x=array, other=np.array(["text"]))
    np.testing.assert_array_equal(read_npz(tmp_path / "a.npz", ["x"])["x"], array)


def header_of(shape):
    stored = io.BytesIO()
    np.lib.format.write_array_header_1_0(stored, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stored.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header_of((10**6, 10**6, 10**3)), "takes 1000000000000000 bytes, but it has 0"),
        (header_of((4,)) + b"123", "takes 4 bytes, but it has 3"),
        (header_of((4,)) + b"12345", "takes 4 bytes, but it has 5"),
        (header_of((-1, -3)) + b"123", "but it has 3"),
        (header_of((1,)).replace(b"(1,)", b"(" * 50 + b"1"), "cannot be read as a NumPy archive"),
        (b"junk" * 10, "cannot be read as a NumPy archive"),
        (b"", "cannot be read as a NumPy archive"),
        (npy(np.array(["a"])), "is of type <U1, expected numbers"),
        (npy(np.zeros(2, [("a", "i4")])), "expected numbers"),
        (npy(np.zeros(2, "complex64")), "is of type complex64, expected numbers"),
    ],
)
def test_an_array_that_lies_is_refused(tmp_path, content, said):
    with pytest.raises(InputError, match=said):
        read_npz(zipped(tmp_path / "a.npz", ("x.npy", content)), ["x"])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice_or_not_at_all_is_refused(tmp_path):
    one = npy(np.ones(2))
    with pytest.raises(InputError, match="has 2 arrays x, expected one"):
        read_npz(zipped(tmp_path / "a.npz", ("x.npy", one), ("x.npy", one)), ["x"])
    with pytest.raises(InputError, match="has no array y, expected one; it has x"):
        read_npz(zipped(tmp_path / "a.npz", ("x.npy", one)), ["x", "y"])


def test_what_unpacks_to_more_than_a_data_set_takes_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "LARGEST", 100_000)
    zipped(tmp_path / "a.npz", ("x.npy", npy(np.zeros(200_000, "uint8"))))
    with pytest.raises(InputError, match="unpacks to 200,128 bytes or more, expected at most 100,000"):
        read_npz(tmp_path / "a.npz", ["x"])
    with h5py.File(tmp_path / "a.h5", "w") as stored:
        stored.create_dataset("x", shape=(10**9,), dtype="f4", chunks=(1024,), compression="gzip")
    with pytest.raises(InputError, match="unpacks to 4,000,000,000 bytes"):
        read_h5(tmp_path / "a.h5", ["x"])
    for kind in ("w:gz", "w:xz", "w:bz2", "w"):
        tarred(tmp_path / "a.tar", [("a.txt", b" " * 60_000), ("b.txt", b" " * 60_000)], kind)
        with pytest.raises(InputError, match="unpacks to"):
            list(tar_members(tmp_path / "a.tar"))


def test_a_long_name_in_an_archive_is_bounded_too(tmp_path, monkeypatch):
    tarred(tmp_path / "a.tar", [("a" * 300_000, b"")], "w:xz")
    monkeypatch.setattr(data_files, "LARGEST", 100_000)
    with pytest.raises(InputError, match="unpacks to"):
        list(tar_members(tmp_path / "a.tar"))


def tarred(file, members, mode="w:xz"):
    with tarfile.open(file, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_members_are_read_and_links_are_not_followed(tmp_path, mode):
    file = tarred(tmp_path / "a.tar", [("../a.txt", b"one"), ("large.txt", b"x" * 100)], mode)
    if mode == "w":
        with tarfile.open(file, "a") as archive:
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
                link = tarfile.TarInfo("link.txt")
                link.type, link.linkname = kind, "/etc/passwd"
                archive.addfile(link)
    assert list(tar_members(file, 50)) == [("../a.txt", b"one")]


def test_hdf5_is_read_from_the_file_itself_alone(tmp_path):
    elsewhere = tmp_path / "elsewhere.h5"
    with h5py.File(elsewhere, "w") as other:
        other["x"] = np.ones(4, "float32")
    (tmp_path / "raw").write_bytes(b"secret__")
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource(str(elsewhere), "x", shape=(4,))
    with h5py.File(tmp_path / "a.h5", "w") as stored:
        stored["good/x"] = np.arange(3)
        stored["link"] = h5py.ExternalLink(str(elsewhere), "/x")
        stored["soft"] = h5py.SoftLink("/soft")
        stored.create_dataset("raw", shape=(8,), dtype="u1", external=[(str(tmp_path / "raw"), 0, 8)])
        stored.create_virtual_dataset("virtual", layout)
        stored["text"] = ["a"]
        stored["empty"] = h5py.Empty("f4")
    assert read_h5(tmp_path / "a.h5", ["good/x"])["good/x"].tolist() == [0, 1, 2]
    for name, said in {
        "link": "is a link elsewhere",
        "soft": "is a link elsewhere",
        "raw": "takes its numbers from another file",
        "virtual": "takes its numbers from another file",
        "text": "is of type object, expected numbers",
        "empty": "is not an array",
        "good": "is not an array",
        "good/x/y": "has no array",
    }.items():
        with pytest.raises(InputError, match=f"{name} {said}" if said != "has no array" else said):
            read_h5(tmp_path / "a.h5", [name])


def test_a_pipe_is_no_data(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda file: read_npz(file, ["x"]), lambda file: list(tar_members(file)), read_text):
        with pytest.raises(InputError, match="not a regular file"):
            read(tmp_path / "pipe")
