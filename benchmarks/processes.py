"""Measures work in a process of its own: its start, its time and its memory.

A *tool* is a function that imports what it needs and returns the work as a function without arguments; it is named
"module:function" and given strings. What the tool takes until it returns is its start-up, what the work takes its time.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

INTERVAL = 1 / 20
"""Seconds between two looks at the memory of the process."""


class ToolFailed(RuntimeError):
    """The process ended without a result."""


def measure(tool: str, *arguments: str) -> dict[str, Any]:
    """Run a tool in a fresh interpreter, its cache of decompositions empty.

    Returns:
        `start_up_seconds`, from the start of the process until the tool has its imports; `seconds` of the work and
        `processor_seconds`, those of all its threads together;
        `peak_bytes`, the most resident memory the process ever had, mapped files included; `peak_anonymous_bytes`, the
        most memory of its own seen by looking at it 20 times a second; `result`, what the work returned.

    Raises:
        ToolFailed: it failed; the message is the last line of its error.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        command = [sys.executable, "-m", "benchmarks.processes", str(time.monotonic()), tool, *arguments]
        environment = os.environ | {"SPECTRALBASIS_CACHE": f"{folder}/cache"}
        with output.open("w") as stdout, errors.open("w") as stderr:
            child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            peak = _watch(child)
        if child.returncode:
            raise ToolFailed(f"{tool}: {errors.read_text().strip().rpartition(chr(10))[2]}")
        return json.loads(output.read_text().splitlines()[-1]) | {"peak_anonymous_bytes": peak}


def _watch(child: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a process and return the most anonymous memory that it was seen to have."""
    peak = 0
    while child.poll() is None:
        peak = max(peak, memory(child.pid, "RssAnon"))
        time.sleep(INTERVAL)
    return peak


def memory(process: int | str, field: str) -> int:
    """One of the sizes in `/proc/PROCESS/status`, in bytes; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main() -> None:
    started, tool, *arguments = sys.argv[1:]
    module, _, function = tool.partition(":")
    work = getattr(importlib.import_module(module), function)(*arguments)
    ready, processor = time.monotonic(), time.process_time()
    result = work()
    figures = {
        "start_up_seconds": ready - float(started),
        "seconds": time.monotonic() - ready,
        "processor_seconds": time.process_time() - processor,
        # Not getrusage: its maximum is inherited from the process that started this one.
        "peak_bytes": memory("self", "VmHWM"),
        "result": result,
    }
    print(f"\n{json.dumps(figures)}")


if __name__ == "__main__":
    main()
