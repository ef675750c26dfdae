"""Too little memory, workers that die, and a clock that goes back."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case, Trial
from benchmarks.faults.commands import start
from benchmarks.faults.full import COMPARE, STUDY, arguments
from benchmarks.faults.interrupted import JOBS, WORKERS
from benchmarks.faults.killed import Command, comparison, litter, study, tuning
from spectralbasis.study import runs

MEMORY, CLOCK = "memory", "clock"
LARGE = 4000
ROOM = 140 << 20
"""Bytes that a process may take beyond what it has when it begins: less than comparing such matrices takes."""


def matrix_is_too_large(bench: Bench, wanted: int) -> Iterator[Trial]:
    """Compare with one matrix that the memory cannot hold; all others are to be measured as without it."""
    for _ in range(min(wanted, 1)):
        with bench.room() as room:
            files = room / "base.safetensors", room / "tuned.safetensors"
            for file, small in zip(files, bench.pair, strict=True):
                save_file({**load_file(small), "layer.9.dense.weight": torch.zeros(LARGE, LARGE)}, file)
            ended = bench.compare(room / "out", pair=files, before=_little_memory)
            others = ended.code == 0 and bench.is_compared(room / "out", skipped={"layer.9.dense"})
            yield Trial(ended, "as undisturbed" if others else "refused" if ended.code else "other values")


def _little_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def worker_is_killed(
    make: Callable[[Bench], Command], words: tuple[str, ...]
) -> Callable[[Bench, int], Iterator[Trial]]:
    """Kill a worker at work, as the system does where memory runs out; the command goes on by itself."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for number in range(wanted):
            with bench.room() as room:
                started = start(
                    [*arguments(bench, words), "-o", room / "out"], {"SPECTRALBASIS_CACHE": str(room / "cache")}
                )
                started.wait_for(lambda at=started.process.pid: len(_workers(at)) > 1)
                time.sleep(3 + number)
                for worker in _workers(started.process.pid)[:1]:
                    os.kill(worker, signal.SIGKILL)
                ended = started.end()
                whole = ended.code == 0 and command.is_whole(room / "out")
                yield Trial(ended, "as undisturbed" if whole else "refused" if ended.code else "other values")

    return trials


def _workers(process: int) -> list[int]:
    """The processes that a command started to work for it."""
    children = psutil.Process(process).children() if psutil.pid_exists(process) else []
    return [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]


def clock_goes_back(make: Callable[[Bench], Command]) -> Callable[[Bench, int], Iterator[Trial]]:
    """Give a command twice, all files of the first dated in the future, while the clock goes back an hour a reading."""

    def trials(bench: Bench, wanted: int) -> Iterator[Trial]:
        command = make(bench)
        for _ in range(min(wanted, 1)):
            with bench.room() as room:
                ended = command.call(room / "out", before=_back)
                lost = "; ".join(f"left over: {name}" for name in litter(room))
                if command.again:
                    for file in room.rglob("*"):
                        os.utime(file, (4e9, 4e9))
                    ended = command.call(room / "out", *command.again, before=_back)
                whole = ended.code == 0 and command.is_whole(room / "out")
                yield Trial(ended, "as undisturbed" if whole else "refused" if ended.code else "other values", lost)

    return trials


def _back() -> None:
    readings = [time.time()]

    def earlier() -> float:
        readings[0] -= 3600
        return readings[0]

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=earlier() % 1e6)

    time.time = earlier
    runs.datetime = Earlier  # type: ignore[misc]


CASES = (
    Case(MEMORY, "compare, a matrix larger than the memory", matrix_is_too_large, 1, 1, None),
    Case(
        MEMORY,
        "compare with two workers, one is killed",
        worker_is_killed(comparison, (*COMPARE, *WORKERS)),
        2,
        None,
        None,
    ),
    Case(MEMORY, "study with two jobs, one is killed", worker_is_killed(study, (*STUDY, *JOBS)), 1, None, None),
    Case(CLOCK, "compare, then with --resume", clock_goes_back(comparison), 1, 1, None),
    Case(CLOCK, "tune", clock_goes_back(tuning), 1, None, None),
    Case(CLOCK, "study", clock_goes_back(study), 1, None, None),
)
