"""A torch file is read as torch reads it record by record, or it is refused: no two readers see different weights."""

import io
import struct
import warnings
import zipfile

import pytest
import torch

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError

STATE = {"a.weight": torch.arange(64.0).reshape(8, 8), "b.weight": -torch.arange(24.0).reshape(4, 6).half()}


def saved(state=STATE) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def records(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(held, compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", compression) as archive:
        warnings.simplefilter("ignore", UserWarning)  # a name that is there twice
        for name, content in held.items() if isinstance(held, dict) else held:
            archive.writestr(name, content)
    return stream.getvalue()


def read_by_torch(path):
    """Every tensor by torch's other way, which copies record after record and checks their sums."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=False)


def assert_read_as_torch_does(path):
    expected, opened = read_by_torch(path), open_checkpoint(path)
    assert set(opened.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(opened.read(name), tensor)


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def name_of(content: bytes, end: str) -> str:
    return next(name for name in records(content) if name.endswith(end))


@pytest.mark.parametrize("write", [lambda content: content, lambda content: archived(records(content))])
def test_plain_archives_are_read(tmp_path, write):
    (tmp_path / "a.pt").write_bytes(write(saved()))
    assert_read_as_torch_does(tmp_path / "a.pt")


def test_file_of_a_machine_with_the_other_byte_order_is_read(tmp_path):
    held = records(saved())
    for name in held:
        if name.endswith("byteorder"):
            held[name] = b"big"
        if "/data/" in name:
            width = 4 if len(held[name]) == 256 else 2
            held[name] = b"".join(held[name][i : i + width][::-1] for i in range(0, len(held[name]), width))
    (tmp_path / "a.pt").write_bytes(archived(held))
    assert torch.equal(open_checkpoint(tmp_path / "a.pt").read("a.weight"), STATE["a.weight"])
    assert_read_as_torch_does(tmp_path / "a.pt")


def test_compressed_records_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(archived(records(saved()), zipfile.ZIP_DEFLATED))
    assert "is compressed" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("rename", [lambda name: name, lambda name: name.replace("data/0", "DATA/0")])
def test_record_that_is_there_twice_is_refused(tmp_path, rename):
    held = list(records(saved()).items())
    name = next(name for name, _ in held if name.endswith("data/0"))
    (tmp_path / "a.pt").write_bytes(archived([*held, (rename(name), b"\0" * 256)]))
    assert "twice" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("larger", [{**STATE, "a.weight": torch.zeros(16, 16)}, {**STATE, "b.weight": torch.ones(99)}])
def test_storage_that_claims_more_than_its_record_is_refused(tmp_path, larger):
    held = records(saved())
    own = next(name for name in held if name.endswith("data.pkl"))
    held[own] = records(saved(larger))[name_of(saved(larger), "data.pkl")]
    (tmp_path / "a.pt").write_bytes(archived(held))
    assert "claims" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(("place", "value"), [(4 + 2 + 2, b"\x08\0"), (18, b"\x01\0\0\0"), (30, b"X")])
def test_record_whose_headers_differ_is_refused(tmp_path, place, value):
    content = bytearray(archived(records(saved())))
    start = content.index(name_of(content, "data/0").encode()) - 30
    content[start + place : start + place + len(value)] = value
    (tmp_path / "a.pt").write_bytes(content)
    assert refusal(tmp_path / "a.pt")


def test_record_over_another_is_refused(tmp_path):
    content = bytearray(archived(records(saved())))
    directory = content.index(b"PK\x01\x02")
    first, second = (content.index(name_of(content, end).encode(), directory) - 46 for end in ("data/0", "data/1"))
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    (tmp_path / "a.pt").write_bytes(content)
    assert "overlaps" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("change", [lambda content: content + b"more", lambda content: content[:-2] + b"\x05\0hello"])
def test_archive_that_does_not_end_with_its_directory_is_refused(tmp_path, change):
    (tmp_path / "a.pt").write_bytes(change(saved()))
    assert refusal(tmp_path / "a.pt")


def test_second_directory_does_not_hide_the_first(tmp_path):
    """An archive within an archive's comment or behind it: readers that look from either end find another one."""
    other = archived(records(saved({**STATE, "a.weight": torch.zeros(8, 8)})))
    (tmp_path / "a.pt").write_bytes(archived(records(saved())) + other)
    assert refusal(tmp_path / "a.pt")


def test_changed_directories_are_refused_or_read_as_torch_does(tmp_path):
    content, path = saved(), tmp_path / "a.pt"
    directory = content.index(b"PK\x01\x02")
    accepted = 0
    for place in range(directory, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            open_checkpoint(path)
        except InputError:
            continue
        accepted += 1
        assert_read_as_torch_does(path)
    assert accepted > 20  # dates, versions and rights say nothing about the weights


def test_large_sparse_archive_is_refused_at_once(tmp_path):
    content = bytearray(archived(records(saved())))
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 0xF0000000, 0, 0)
    with (tmp_path / "a.pt").open("wb") as file:
        file.write(content)
        file.seek(1 << 40)
        file.write(end)
    assert refusal(tmp_path / "a.pt")
