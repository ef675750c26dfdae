"""A file appears whole or not at all, keeps its mode, and nothing but what we left is ever cleared away."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from filelock import FileLock

from spectralbasis import files
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, check_output_files


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


WRITER = (
    "import sys, time\nfrom spectralbasis.files import atomic_path\n"
    "with atomic_path(sys.argv[1]) as path:\n    path.write_text('half')\n    time.sleep(60)\n"
)


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    target = tmp_path / "result.txt"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
    while not (half := [file for file in tmp_path.rglob("result.txt") if file.stat().st_size]):
        time.sleep(0.01)
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert half[0].exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with atomic_path(tmp_path / "other.txt") as temporary:
        temporary.write_text("of another name")
    assert half[0].exists()
    with atomic_path(target) as temporary:
        temporary.write_text("whole again")
    assert target.read_text() == "whole again"
    assert sorted(tmp_path.iterdir()) == sorted([target, tmp_path / "other.txt"])


def left_over(target):
    """A folder as a killed process leaves it beside a target."""
    scratch = target.with_name(files._prefix(target) + "abcdefgh")
    (scratch / "new").mkdir(parents=True)
    (scratch / "new" / target.name).write_text("half")
    (scratch / "spectralbasis.lock").touch()
    return scratch


def write(target):
    with atomic_path(target) as temporary:
        temporary.write_text("whole")


@pytest.mark.parametrize("with_lock", [True, False])
def test_only_a_folder_with_our_lock_in_it_is_cleared_away(tmp_path, with_lock):
    target = tmp_path / "env"
    scratch = left_over(target)
    if not with_lock:
        (scratch / "spectralbasis.lock").unlink()
    names = (".env.template", ".env.abcdefgh", f"{files._prefix(target)}notes.txt")
    for name in names:
        (tmp_path / name).write_text("a person's")
    write(target)
    assert scratch.exists() is not with_lock
    assert {(tmp_path / name).read_text() for name in names} == {"a person's"}


def test_a_link_that_looks_like_a_folder_of_ours_is_neither_followed_nor_removed(tmp_path):
    target, elsewhere = tmp_path / "out" / "result.txt", tmp_path / "elsewhere"
    target.parent.mkdir()
    left_over(target).rename(elsewhere)
    link = target.with_name(files._prefix(target) + "abcdefgh")
    link.symlink_to(elsewhere)
    precious = tmp_path / "precious"
    precious.write_text("a person's")
    scratch = left_over(target.with_name("b.txt"))
    (scratch / "spectralbasis.lock").unlink()
    (scratch / "spectralbasis.lock").symlink_to(precious)
    write(target)
    write(target.with_name("b.txt"))
    assert link.is_symlink()
    assert (elsewhere / "new" / "result.txt").exists()
    assert scratch.exists()
    assert precious.read_text() == "a person's"


def test_where_there_are_no_locks_nothing_is_cleared_away_and_the_file_is_written(tmp_path, monkeypatch):
    def without_locks(self):
        files.Path(self.lock_file).touch()
        raise NotImplementedError("FileSystem does not appear to support flock")

    scratch = left_over(tmp_path / "result.txt")
    monkeypatch.setattr(FileLock, "_acquire", without_locks)
    write(tmp_path / "result.txt")
    monkeypatch.undo()
    assert (tmp_path / "result.txt").read_text() == "whole"
    assert scratch.exists()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_a_file_keeps_its_mode_when_it_is_written_again(tmp_path, mode):
    target = tmp_path / "result.txt"
    target.write_text("old")
    target.chmod(mode)
    write(target)
    assert target.read_text() == "whole"
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_the_umask_gives_and_no_thread_sees_another_umask(tmp_path):
    seen, stop = set(), threading.Event()

    def look():
        number = 0
        while not stop.is_set():
            number += 1
            handle = os.open(tmp_path / f"probe{number}", os.O_CREAT | os.O_WRONLY, 0o666)
            seen.add(stat.S_IMODE(os.fstat(handle).st_mode))
            os.close(handle)

    before = os.umask(0o027)
    try:
        watcher = threading.Thread(target=look)
        watcher.start()
        for number in range(30):
            write(tmp_path / f"file{number}")
        stop.set()
        watcher.join()
    finally:
        os.umask(before)
    assert seen == {0o640}
    assert stat.S_IMODE((tmp_path / "file0").stat().st_mode) == 0o640


def test_a_folder_that_another_holds_locked_is_written_at_once(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        write(tmp_path / "result.txt")
    finally:
        os.close(handle)
    assert (tmp_path / "result.txt").read_text() == "whole"


def test_an_output_that_is_no_file_is_refused_and_left_as_it_is(tmp_path):
    elsewhere, link, dangling = (tmp_path / name for name in ("elsewhere", "link", "dangling"))
    elsewhere.write_text("a person's")
    link.symlink_to(elsewhere)
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for path, why in {
        link: "is a link to .*elsewhere; name the file itself",
        dangling: "is a link to .*nowhere",
        tmp_path / "fifo": "is not a regular file",
        tmp_path / "folder": "is a folder, expected a file",
        tmp_path / "a\0b": "a name that no file can have",
        tmp_path / ("a" * 300): "File name too long; give a shorter name",
        tmp_path / "elsewhere" / "b": "Not a directory",
    }.items():
        with pytest.raises(InputError, match=why):
            write(path)
        with pytest.raises(InputError, match=why):
            check_output_files(path.parent, path.name) if path.parent == tmp_path else write(path)
    assert elsewhere.read_text() == "a person's"
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (tmp_path / "fifo").is_fifo()


def test_a_name_as_long_as_names_may_be_can_be_written(tmp_path):
    target = tmp_path / ("a" * 255)
    write(target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_temporary_file_that_a_library_replaced_is_still_its_writers(tmp_path):
    target = tmp_path / "result.txt"
    with atomic_path(target) as first:
        first.write_text("other")
        first.unlink()
        first.write_text("first")
        with atomic_path(target) as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
