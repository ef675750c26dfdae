"""No room, no right to write, and two writers: what was there stays, and the command goes on when it can."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, Trial
from benchmarks.faults.commands import Ended, start
from benchmarks.faults.killed import Command, comparison, litter, study, tuning

ROOM, RIGHTS, WRITERS = "full disk", "read-only", "two writers"
MIB = 1 << 20


@contextmanager
def mounted(place: Path, options: str) -> Iterator[bool]:
    """A small file system in memory at a folder; False where this process may mount none."""
    place.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield done
    finally:
        if done:
            subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Change the options of a file system."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def disk_is_full(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Let a command run into the end of a small disk at different sizes, then give it again on a larger one."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        with bench.room() as room:
            command.call(room / "out")
            needed = sum(file.stat().st_size for file in (room / "out").rglob("*") if file.is_file())
        for size in (needed * np.linspace(0.02, 0.98, wanted)).astype(int):
            with bench.room() as room, mounted(room / "disk", f"size={max(int(size), 1 << 13)}") as can:
                out = room / "disk" / "out" if can else room / "out"
                limit = None if can else _files_of_at_most(int(size) // 2)
                ended = command.call(out, before=limit, environment={"SPECTRALBASIS_CACHE": str(room / "cache")})
                if ended.code == 0:
                    continue
                if can:
                    remount(room / "disk", f"size={64 * MIB}")
                yield _given_again(command, out, ended, room / "cache")

    return trials


def cache_is_full(bench: Bench, wanted: int) -> Iterator[Trial]:
    """Let a comparison find no room for its cache, which it can do without."""
    for size in np.linspace(1, 4096, wanted).astype(int):
        with bench.room() as room, mounted(room / "cache", f"size={size}k,nr_inodes=6") as can:
            if not can:
                return
            ended = bench.compare(room / "out", environment={"SPECTRALBASIS_CACHE": str(room / "cache")})
            yield Trial(ended, _outcome(ended, bench.is_compared(room / "out")))


def cache_is_read_only(bench: Bench, wanted: int) -> Iterator[Trial]:
    """Let a comparison find a cache that it may not write."""
    for _ in range(min(wanted, 1)):
        with bench.room() as room, mounted(room / "cache", "ro") as can:
            place = room / "cache" if can else bench.pair[0]
            ended = bench.compare(room / "out", environment={"SPECTRALBASIS_CACHE": str(place)})
            yield Trial(ended, _outcome(ended, bench.is_compared(room / "out")))


def folder_is_read_only(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Let a command write to a file system that is read-only, which stops root too, then to the same when it is not."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for _ in range(min(wanted, 1)):
            with bench.room() as room, mounted(room / "disk", "size=64m") as can:
                if can:
                    remount(room / "disk", "ro")
                else:
                    (room / "disk").chmod(0o500)
                out = room / "disk" / "out"
                ended = command.call(out, environment={"SPECTRALBASIS_CACHE": str(room / "cache")})
                if can:
                    remount(room / "disk", "rw")
                (room / "disk").chmod(0o700)
                yield _given_again(command, out, ended, room / "cache")

    return trials


def folder_is_a_file(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Give a command a file for its output, and a folder below a file."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for out in ("file", "file/out")[:wanted]:
            with bench.room() as room:
                (room / "file").write_text("something else")
                ended = command.call(room / out, environment={"SPECTRALBASIS_CACHE": str(room / "cache")})
                kept = (room / "file").read_text() == "something else"
                yield Trial(ended, "refused" if ended.code == 1 else "other values", "" if kept else "the file")

    return trials


def second_writer(make: Callable[[Bench], Command], *words: str) -> Callable[[Bench, int], Iterator[Trial]]:
    """Give a command while the same one is at work in the folder, held in the middle; then let the first end."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for _ in range(min(wanted, 1)):
            with bench.room() as room:
                environment = {"SPECTRALBASIS_CACHE": str(room / "cache")}
                first = start([*arguments(bench, words), "-o", room / "out"], environment)
                at_work = first.wait_for(
                    lambda room=room: bool(
                        [file for file in room.glob("out/*.sqlite") if file.stat().st_size]  # made and locked
                        or list(room.glob(".spectralbasis-*/new"))
                    )
                )
                os.kill(first.process.pid, signal.SIGSTOP)
                ended = command.call(room / "out")
                os.kill(first.process.pid, signal.SIGCONT)
                other = first.end()
                whole = at_work and other.code == 0 and command.is_whole(room / "out")
                yield Trial(
                    ended, "refused" if ended.code == 1 else "other values", "" if whole else "the first's results"
                )

    return trials


def arguments(bench: Bench, words: Sequence[str]) -> list[str | Path]:
    """What a person types, with the files of the bench in their places."""
    typed: list[str | Path] = [bench.model if word == "MODEL" else word for word in words]
    if words[0] == "compare":
        typed[1:1] = bench.pair
    return typed


def _given_again(command: Command, out: Path, ended: Ended, cache: Path) -> Trial:
    again = command.call(out, *command.again, environment={"SPECTRALBASIS_CACHE": str(cache)})
    lost = "; ".join(f"left over: {name}" for name in litter(out.parent))
    if again.code:
        return Trial(again, "refused", lost)
    return Trial(ended, "as undisturbed" if command.is_whole(out) else "other values", lost)


def _outcome(ended: Ended, whole: bool) -> str:
    return "refused" if ended.code else "as undisturbed" if whole else "other values"


def _files_of_at_most(size: int) -> Callable[[], None]:
    """Where nothing can be mounted: no file of the process may be larger."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


REFUSED = ("refused",)
COMPARE = ("compare", "--leading", "4", "--draws", "2")
TUNE = ("tune", "MODEL", "--task", "digits", "--steps", "3", "--train-examples", "64", "--leading", "2")
STUDY = ("study", "stability", "--preset", "quick")
CASES = (
    Case(ROOM, "compare", disk_is_full(comparison), 8, 2, "--resume"),
    Case(ROOM, "tune", disk_is_full(tuning), 6),
    Case(ROOM, "study", disk_is_full(study), 3),
    Case(ROOM, "compare, the cache's disk", cache_is_full, 3, 1, None),
    Case(RIGHTS, "compare, the folder", folder_is_read_only(comparison), 1, 1, "--resume"),
    Case(RIGHTS, "compare, the cache", cache_is_read_only, 1, 1, None),
    Case(RIGHTS, "tune, the folder", folder_is_read_only(tuning), 1),
    Case(RIGHTS, "study, the folder", folder_is_read_only(study), 1),
    Case(RIGHTS, "compare, a file in the place of the folder", folder_is_a_file(comparison), 2, 2, None, REFUSED),
    Case(RIGHTS, "tune, a file in the place of the folder", folder_is_a_file(tuning), 2, 2, None, REFUSED),
    Case(RIGHTS, "study, a file in the place of the folder", folder_is_a_file(study), 2, None, None, REFUSED),
    Case(WRITERS, "compare", second_writer(comparison, *COMPARE), 1, None, None, REFUSED),
    Case(WRITERS, "tune", second_writer(tuning, *TUNE), 1, None, None, REFUSED),
    Case(WRITERS, "study", second_writer(study, *STUDY), 1, None, None, REFUSED),
)
