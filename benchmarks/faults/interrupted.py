"""Ctrl-C, once and twice, to a command and all its processes, as a terminal sends it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, Trial
from benchmarks.faults.commands import Ended, start
from benchmarks.faults.full import COMPARE, STUDY, TUNE, arguments
from benchmarks.faults.killed import Command, comparison, litter, study, tuning

GROUP = "Ctrl-C"


def pressed(
    make: Callable[[Bench], Command], words: tuple[str, ...], times: int, *options: str
) -> Callable[[Bench, int], Iterator[Trial]]:
    """Press Ctrl-C so many times when a command is at work, at different moments, and give it again."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for number in range(wanted):
            with bench.room() as room:
                ended = _pressed(bench, room, [*words, *options], times, 0.3 * number)
                again: dict[str, Any] = {"environment": {"SPECTRALBASIS_CACHE": str(room / "cache")}}
                after = command.call(room / "out", *command.again, **again)
                lost = "; ".join(f"left over: {name}" for name in litter(room))
                whole = after.code == 0 and command.is_whole(room / "out")
                yield Trial(ended, "as undisturbed" if whole else "other values", lost)

    return trials


def _pressed(bench: Bench, room: Path, words: list[str], times: int, later: float) -> Ended:
    out = room / "out"
    started = start([*arguments(bench, words), "-o", out], {"SPECTRALBASIS_CACHE": str(room / "cache")})
    started.wait_for(lambda: bool([*out.glob("*.sqlite"), *room.glob(".spectralbasis-*/new")]))
    time.sleep(later)
    for _ in range(times):
        started.interrupt()
        time.sleep(0.2)
    return started.end()


WORKERS = ("--workers", "2")
JOBS = ("--jobs", "2")
CASES = (
    Case(GROUP, "compare, once", pressed(comparison, COMPARE, 1), 2, None, "--resume"),
    Case(GROUP, "compare, twice", pressed(comparison, COMPARE, 2), 2, 1, "--resume"),
    Case(GROUP, "compare with two workers, once", pressed(comparison, COMPARE, 1, *WORKERS), 3, 2, "--resume"),
    Case(GROUP, "compare with two workers, twice", pressed(comparison, COMPARE, 2, *WORKERS), 3, None, "--resume"),
    Case(GROUP, "tune, once", pressed(tuning, TUNE, 1), 1),
    Case(GROUP, "study with two jobs, once", pressed(study, STUDY, 1, *JOBS), 1),
    Case(GROUP, "study with two jobs, twice", pressed(study, STUDY, 2, *JOBS), 1),
)
