"""Runs one reader on a changed file in a process of its own, and judges how that ended."""

import json
import os
import random
import re
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from benchmarks.faults.bench import Bench
from benchmarks.faults.commands import Ended, run
from benchmarks.hostile.mutations import CANARY, Place, mutate
from spectralbasis import cli

Outcome = Literal["as undisturbed", "refused", "other values"]
LONGEST = 40.0
"""Seconds that a command may take; undisturbed, each takes few."""
_MEMORY = 4 << 30
"""Bytes of addresses that a command may take beyond what its process has when it starts."""
_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")
"""What an audit hook sees of a process that runs something else or calls somewhere; no reader does."""
_RAN = "this process ran: "
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]")
"""What a terminal acts on, but for the line breaks, tabs and returns of other libraries' progress bars."""


@dataclass(frozen=True)
class Subject:
    """A kind of file, and what reads it.

    Attributes:
        name: as the table shows it.
        make: writes the files into a new folder.
        files: pattern of those that are changed, relative to the folder.
        read: the command that reads them, or a function that does; messages to stderr.
        value: what the reader made of them, to tell whether it noticed a change.
        checked: whether every change is to be noticed, or to change nothing: the file carries a checksum.
        quick: tries of the tests on every change.
    """

    name: str
    make: Callable[[Bench, Path], None]
    files: str
    read: Callable[[Path], list[str | Path] | Callable[[], None]]
    value: Callable[[Path, Ended], object]
    checked: bool = False
    quick: int = 6


@dataclass(frozen=True)
class Trial:
    """One try: what was changed, how the reader ended, and what is wrong with that."""

    changed: str
    seed: int
    ended: Ended
    outcome: Outcome
    faults: tuple[str, ...]


def trials(subject: Subject, bench: Bench, first_seed: int = 0) -> Iterator[Trial]:
    """Tries without end, each with another seed."""
    with bench.room() as room:
        outside = room / "outside"
        _make_canaries(outside)
        subject.make(bench, room / "whole")
        _copy(room / "whole", room / "read")
        whole = _read(subject, room / "read")
        if whole.code:
            raise RuntimeError(f"{subject.name} could not be read undisturbed: {whole.stderr}")
        expected = subject.value(room / "read", whole)
        seed = first_seed
        while True:
            _copy(room / "whole", room / "read")
            files = sorted(file for file in (room / "read").glob(subject.files) if file.is_file())
            chance = random.Random(f"{subject.name} {seed}")
            changed = mutate(Place(chance.choice(files), outside, chance))
            ended = _read(subject, room / "read")
            yield _judged(subject, room, seed, changed, ended, expected)
            seed += 1


def summary(subject: Subject, made: list[Trial]) -> dict[str, Any]:
    """What the table shows of a subject."""
    return {
        "name": subject.name,
        "trials": len(made),
        "outcomes": dict(Counter(trial.outcome for trial in made)),
        "faults": sum(bool(trial.faults) for trial in made),
        "slowest": round(max(trial.ended.seconds for trial in made), 1),
    }


def complaints(made: list[Trial]) -> list[str]:
    """A line for every fault."""
    return [f"seed {trial.seed}: {trial.changed}: {fault}" for trial in made for fault in trial.faults]


def _make_canaries(outside: Path) -> None:
    """Files that nothing in a try's folder may lead to: of each format one that could be read."""
    outside.mkdir()
    for suffix in ("", ".txt", ".sqlite", ".parquet", ".bin"):
        (outside / f"secret{suffix}").write_text(CANARY)
    (outside / "secret.json").write_text(json.dumps({CANARY: CANARY}))
    save_file({CANARY: torch.ones(4, 4)}, outside / "secret.safetensors", metadata={CANARY: CANARY})


def _copy(whole: Path, read: Path) -> None:
    shutil.rmtree(read, ignore_errors=True)
    shutil.copytree(whole, read)


def _read(subject: Subject, room: Path) -> Ended:
    cache = {"SPECTRALBASIS_CACHE": str(room / "cache")}
    work = subject.read(room)
    if callable(work):
        return run(["--version"], before=lambda: _within_bounds(work), environment=cache, kill_after=LONGEST)
    return run(work, before=lambda: _within_bounds(None), environment=cache, kill_after=LONGEST)


def _within_bounds(work: Callable[[], None] | None) -> None:
    """Bound the process, tell of what it runs, and do the work where that is no command."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_tell_of_runs)
    if work is not None:
        cli.app = lambda **_: work()  # type: ignore[assignment]


def _tell_of_runs(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(_RUNS) and arguments[0] != "git":  # a study asks it for the commit of this package
        os.write(2, f"{_RAN}{event} {arguments!r}\n".encode(errors="replace"))


def _judged(subject: Subject, room: Path, seed: int, changed: str, ended: Ended, expected: object) -> Trial:
    faults = list(_faults(room, ended))
    outcome: Outcome = "refused"
    if not ended.code:
        outcome = "as undisturbed" if subject.value(room / "read", ended) == expected else "other values"
        if outcome == "other values" and subject.checked:
            faults.append("read as other values, in spite of its checksum")
    return Trial(changed, seed, ended, outcome, tuple(faults))


def _faults(room: Path, ended: Ended) -> Iterator[str]:
    if ended.code == -9:
        yield f"it hung for {ended.seconds:.0f} s"
    elif ended.traceback:
        yield f"nobody foresaw it: {ended.stderr[-1500:]}"
    elif ended.code not in (0, 1):
        yield f"exit code {ended.code}: {ended.stderr[-500:]}"
    elif ended.code and not re.search("^error: ", ended.stderr, re.MULTILINE):
        yield f"no sentence: {ended.stderr[-500:]}"
    if _RAN in ended.stderr:
        yield ended.stderr[ended.stderr.index(_RAN) :][:300]
    if _CONTROL.search(ended.stderr):
        yield f"control characters reached the terminal: {ended.stderr!r:.500}"
    if len(ended.stderr) > 20_000:
        yield f"a message of {len(ended.stderr)} characters"
    for file in (room / "outside").iterdir():
        if CANARY.encode() not in file.read_bytes():
            yield f"it changed a file outside: {file.name}"
    for file in (room / "read").rglob("*"):
        if not file.is_symlink() and file.is_file() and file.stat().st_size < 1 << 28 and _gained_canary(room, file):
            yield f"it copied a file from outside into {file.relative_to(room / 'read')}"


def _gained_canary(room: Path, file: Path) -> bool:
    """Whether a file that the reader wrote holds what only files outside hold."""
    ours = room / "whole" / file.relative_to(room / "read")
    return not ours.exists() and CANARY.encode() in file.read_bytes()
