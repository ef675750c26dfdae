"""A file appears whole or not at all."""

import pytest

from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "result.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        temporary.write_text(f"half {1 // 0}")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_finished_write_replaces_the_old_file_and_makes_folders(tmp_path):
    target = tmp_path / "new" / "folder" / "result.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_in_the_way_of_the_folder_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose a folder that you may write to"), atomic_path(tmp_path / "file" / "x"):
        pass
