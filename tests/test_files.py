"""A file appears whole or not at all."""

import os
import signal
import subprocess
import sys
import time

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


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    target, other = tmp_path / "result.txt", tmp_path / ".result.txt.old.abcdefgh.txt"
    other.write_text("of another file")
    program = (
        "import sys, time\nfrom spectralbasis.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as path:\n    path.write_text('half')\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(target)])
    while not (half := [file for file in tmp_path.iterdir() if file != other and file.stat().st_size]):
        time.sleep(0.01)
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert half[0].exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with atomic_path(target) as temporary:
        temporary.write_text("whole again")
    assert target.read_text() == "whole again"
    assert sorted(tmp_path.iterdir()) == sorted([target, other])


def test_a_temporary_file_that_a_library_replaced_is_still_its_writers(tmp_path):
    target = tmp_path / "result.txt"
    with atomic_path(target) as first:
        first.unlink()
        first.write_text("first")
        with atomic_path(target) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
