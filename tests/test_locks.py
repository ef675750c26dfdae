"""A lock is held as long as its holder lives, and what cannot be told is not guessed."""

import pytest

from spectralbasis import locks
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path
from spectralbasis.folders import atomic_folder


def test_a_lock_is_held_until_the_block_ends(tmp_path):
    assert locks.is_held(tmp_path) is False
    with locks.held(tmp_path):
        assert locks.is_held(tmp_path) is True
        with locks.held(tmp_path):  # a second holder holds nothing, and takes nothing away
            pass
        assert locks.is_held(tmp_path) is True
    assert locks.is_held(tmp_path) is False


def test_nothing_can_be_told_of_what_is_not_there(tmp_path):
    assert locks.is_held(tmp_path / "absent") is None


def test_where_there_are_no_locks_nobody_is_refused_and_nothing_cleared_away(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / ".folder.abcd_123").mkdir()
    (tmp_path / ".file.txt.abcd_123.txt").touch()
    with atomic_folder(tmp_path / "folder"), atomic_path(tmp_path / "file.txt"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".file.txt.abcd_123.txt", ".folder.abcd_123", "file.txt", "folder",
    ]  # fmt: skip


def test_only_names_that_we_give_are_left_over(tmp_path):
    for name in (".a.abcdefgh", ".a.ABCDEFGH", ".a.abcdefghi", ".a.b.abcdefgh", "a.abcdefgh", ".ab.abcdefgh"):
        (tmp_path / name).touch()
    assert [path.name for path in locks.left_over(tmp_path / "a")] == [".a.abcdefgh"]


def test_a_folder_that_another_writes_is_refused(tmp_path):
    (tmp_path / ".folder.abcd_123" / "new").mkdir(parents=True)
    with (
        locks.held(tmp_path / ".folder.abcd_123"),
        pytest.raises(InputError, match="another command is writing"),
        atomic_folder(tmp_path / "folder"),
    ):
        pass
