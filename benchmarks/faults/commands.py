"""Runs the command line in a process of its own, and says how that ended."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from spectralbasis.cli import main

for part in ("comparison", "report", "study.conduct", "study.actions", "study.experiments.stability"):
    import_module(f"spectralbasis.{part}")  # so that a process forked from this one finds it there

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
WARNING = " UserWarning: "
DEADLINE = 300.0
"""Seconds after which a command that still runs is taken to hang."""

Arguments = Sequence[str | Path]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative where a signal ended it, what it wrote to stderr, and its time."""

    code: int
    stderr: str
    seconds: float = 0.0

    @property
    def told(self) -> str:
        """What a person is told: the last line, unless an earlier one warns or says that nobody foresaw this."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        warned = [line.partition(WARNING)[2] for line in lines if WARNING in line]
        unforeseen = [line for line in lines if line.startswith("unexpected ")]
        return [*lines[-1:], *warned, *unforeseen][-1] if lines else ""

    @property
    def traceback(self) -> bool:
        """Whether a person was shown one, or an error that nobody foresaw."""
        return "Traceback (most recent call last)" in self.stderr or self.told.startswith("unexpected ")


def run(
    arguments: Arguments,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Run a command in a process forked from this one, which has imported everything, and so starts at once.

    Args:
        arguments: what a person types after `spectralbasis`.
        before: what the process does to itself first: set a limit, or wait for the moment to die.
        environment: variables to add.
        kill_after: seconds after which the process is killed.
    """
    started = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _become(arguments, write, before, environment or {})
    os.close(write)
    timer = threading.Timer(DEADLINE if kill_after is None else kill_after, os.kill, (child, signal.SIGKILL))
    timer.start()
    with os.fdopen(read, "rb") as pipe:
        stderr = pipe.read().decode(errors="replace")
    timer.cancel()
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stderr, time.monotonic() - started)


def _become(
    arguments: Arguments, write: int, before: Callable[[], None] | None, environment: Mapping[str, str]
) -> None:
    """Be the command, to its end; never returns."""
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(write, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        os.environ.update({**ENVIRONMENT, **environment})
        warnings.resetwarnings()
        sys.argv = ["spectralbasis", *map(str, arguments)]
        if before is not None:
            before()
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Started:
    """A command that runs in a fresh interpreter and a process group of its own."""

    process: subprocess.Popen[str]

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until something shows that the command is at work; False where it ended before."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline and self.process.poll() is None:
            if ready():
                return True
            time.sleep(0.01)
        return False

    def interrupt(self) -> None:
        """What a terminal does at Ctrl-C: a signal to the command and to all processes that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> Ended:
        """Wait for the end; a command that hangs is killed, which its exit code shows."""
        try:
            _, stderr = self.process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            _, stderr = self.process.communicate()
        return Ended(self.process.returncode, stderr)


def start(arguments: Arguments, environment: Mapping[str, str] | None = None) -> Started:
    """Start a command as a shell in a terminal does, so that Ctrl-C reaches it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "spectralbasis", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, **ENVIRONMENT, **(environment or {})},
    )
    return Started(process)


def without_paths(told: str) -> str:
    """A message with the folders of a test cut to their last part, and the random part of names left out."""
    return re.sub(r"/(?:[^\s/'\"]+/)+", "…/", told)
