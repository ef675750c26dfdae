"""SIGKILL, before each file operation of a command and at random moments: nothing that was finished is lost."""

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, Trial
from benchmarks.faults.commands import Ended
from spectralbasis.comparison.store import Store
from spectralbasis.files import LIST
from spectralbasis.study.runs import RunStore

GROUP = "killed"
FINISHED = "SELECT matrix FROM pairs", "SELECT key FROM runs"
WATCHED = ("open", "os", "shutil", "sqlite3")


@dataclass(frozen=True)
class Command:
    """A command that is killed and given again.

    Attributes:
        call: runs it into a folder.
        is_whole: whether the folder holds what an undisturbed run leaves.
        again: options with which it is given again.
        prepare: what is done to the folder before.
        keeps: a file that is there before, and at any moment after.
    """

    call: Callable[..., Ended]
    is_whole: Callable[[Path], bool]
    again: tuple[str, ...] = ()
    prepare: Callable[[Path], Any] | None = None
    keeps: str = ""


def before_each_operation(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Kill a command before each thing that it does to a file of its output, or before so many of them."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for last in _some(_operations(bench, command), wanted):
            with bench.room() as room:
                yield from _killed(command, room, lambda out, last=last: {"before": _watch(out, last)})

    return trials


def at_any_moment(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Kill a command from outside at random moments."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        with bench.room() as room:
            seconds = _prepared(command, room)(room / "out").seconds
        for moment in seconds * np.random.default_rng(0).uniform(0.02, 0.98, wanted):
            with bench.room() as room:
                yield from _killed(command, room, lambda out, at=moment: {"before": _watch(out), "kill_after": at})

    return trials


def _killed(command: Command, room: Path, how: Callable[[Path], dict[str, Any]]) -> Iterator[Trial]:
    """Run a command that is killed, see what is left, and give it again; nothing where it ended before."""
    out = room / "out"
    ended = _prepared(command, room)(out, **how(out))
    if ended.code != -signal.SIGKILL:
        return
    lost = [f"{number} finished" for number in [len(_noted(out) - _stored(out))] if number]
    if command.keeps and not (out / command.keeps).is_file():
        lost.append(f"{command.keeps} of the run before")
    after = command.call(out, *command.again)
    lost += [f"left over: {name}" for name in litter(room)]
    if after.code and not command.is_whole(out):
        yield Trial(replace(after, code=ended.code), "refused", "; ".join(lost))
    else:
        yield Trial(ended, "as undisturbed" if command.is_whole(out) else "other values", "; ".join(lost))


def _prepared(command: Command, room: Path) -> Callable[..., Ended]:
    if command.prepare is not None:
        command.prepare(room / "out")
    return command.call


def _operations(bench: Bench, command: Command) -> int:
    """How many things a command does to files of its output."""
    with bench.room() as room:
        _prepared(command, room)(room / "out", before=_watch(room / "out"))
        return (room / "operations").stat().st_size


def _some(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 1 to `total`, spread evenly; all where it is 0."""
    if wanted == 0:
        return list(range(1, total + 1))
    return sorted({int(number) for number in np.linspace(1, total, wanted + 2)[1:-1].round()})


def _watch(out: Path, last: int = 0) -> Callable[[], None]:
    """Let a process count what it does to files of `out`, note what it finishes, and die before operation `last`."""

    def begin() -> None:
        append = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        operations, finished = (os.open(out.parent / name, append) for name in ("operations", "finished"))
        places = str(out), str(out.with_name(f".{out.name}."))
        done = 0

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            ours = event.partition(".")[0] in WATCHED and event not in ("os.listdir", "os.scandir")
            if ours and any(isinstance(one, str | Path) and str(one).startswith(places) for one in arguments):
                done += 1
                os.write(operations, b".")
                if done == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hear)
        _note(Store, finished, lambda tuned, matrix, *_: matrix)
        _note(RunStore, finished, lambda run, *_: run.key)

    return begin


def _note(store: Any, file: int, name: Callable[..., str]) -> None:
    """Let a store note what it was given, once it has said that it is kept."""
    put = store.put

    def noting(self: Any, *arguments: Any) -> None:
        put(self, *arguments)
        os.write(file, f"{name(*arguments)}\n".encode())

    store.put = noting


def _noted(out: Path) -> set[str]:
    return set((out.parent / "finished").read_text().split())


def _stored(out: Path) -> set[str]:
    """What the store in a folder holds."""
    found: set[str] = set()
    for file, query in zip(("store.sqlite", "runs.sqlite"), FINISHED, strict=True):
        if (out / file).exists():
            with closing(sqlite3.connect(out / file)) as connection:
                tables = connection.execute("SELECT name FROM sqlite_master").fetchall()
                found |= {row[0] for row in connection.execute(query)} if len(tables) > 1 else set()
    return found


def litter(room: Path) -> list[str]:
    """Hidden files, and folders that hold something, that a killed process left and the next did not clear away."""
    hidden = [file for place in (room, room / "out") for file in place.glob(".*")]
    return sorted(
        f"{file.name[:14]}…" for file in hidden if file.name != LIST and (file.is_file() or any(file.iterdir()))
    )


def comparison(bench: Bench) -> Command:
    return Command(bench.compare, bench.is_compared, ("--resume",))


def tuning(bench: Bench) -> Command:
    return Command(bench.tune, bench.is_tuned)


def tuning_over(bench: Bench) -> Command:
    def tune(out: Path, **how: Any) -> Ended:
        return bench.tune(out, "--overwrite", **how)

    return Command(tune, bench.is_tuned, (), lambda out: bench.tune(out, "--seed", "1"), "tuning.json")


def study(bench: Bench) -> Command:
    return Command(bench.study, bench.is_studied)


CASES = (
    Case(GROUP, "compare, before each file operation", before_each_operation(comparison), 0, 3, "--resume"),
    Case(GROUP, "compare, at any moment", at_any_moment(comparison), 20, 2, "--resume"),
    Case(GROUP, "tune, before each file operation", before_each_operation(tuning), 12, 1),
    Case(GROUP, "tune, at any moment", at_any_moment(tuning), 8),
    Case(GROUP, "tune --overwrite, before each file operation", before_each_operation(tuning_over), 12),
    Case(GROUP, "study, before each file operation", before_each_operation(study), 8),
    Case(GROUP, "study, at any moment", at_any_moment(study), 4),
)
