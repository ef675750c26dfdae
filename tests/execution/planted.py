"""Work for tests of the executors, which workers can import."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from spectralbasis.comparison.distributing import Parcel, perform_parcel
from spectralbasis.comparison.measuring import Outcome


def double(value: int) -> int:
    return 2 * value


def fail(error: Exception) -> None:
    raise error


def unsendable() -> Any:
    return lambda: None


def sleep(seconds: float, started: Path) -> None:
    started.touch()
    time.sleep(seconds)


def die(times: int, marks: Path) -> str:
    """Killed as many times as told, each time leaving a mark, then done."""
    mark(marks, "die")
    if count(marks) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def measure_or_die(parcel: Parcel) -> Outcome | None:
    """Measures a parcel, but for poisoned matrices, which kill the process that touches them."""
    name = parcel.task.before.name
    if "poison" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    found = perform_parcel(parcel)
    marks = _folder(parcel) / "measured"
    if found and any(rows is not None for _, rows in found.measured.values()):
        mark(marks, name)
    return found


def measure_slowly(parcel: Parcel) -> Outcome | None:
    """Leaves a mark when it has measured something, and takes its time."""
    time.sleep(0.1)
    return measure_or_die(parcel)


def measure_blindly(parcel: Parcel) -> Outcome | None:
    """Where no file of the driver's is to be seen."""
    return None if parcel.evidence else perform_parcel(parcel)


def mark(file: Path, line: str) -> None:
    with file.open("a") as marks:
        marks.write(f"{line}\n")


def count(file: Path) -> int:
    return len(file.read_text().split()) if file.exists() else 0


def _folder(parcel: Parcel) -> Path:
    return parcel.evidence[0][0].checkpoint.path.parent
