"""How long does a person wait before a command says what is wrong, or measures its first matrix?

Run with `python -m benchmarks.start_up`. Every row is a process of its own, and the rows take turns. The time that
counts is the processor's, which another process on the machine changes less than the clock's; the least is kept.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.results import environment, parse_arguments, write

COMMAND = "from spectralbasis.cli import main; main()"
TO_THE_FIRST_MATRIX = f"""
import os
from spectralbasis.comparison import distributing
distributing.perform_task = lambda task: os._exit(0)
{COMMAND}
"""
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "import torch": ("import torch", ()),
    "--help": (COMMAND, ("--help",)),
    "a wrong flag": (COMMAND, ("compare", "--nulls")),
    "a path that does not exist": (COMMAND, ("compare", "base", "checkpoints/run-1/tuned")),
    "compare, to its first matrix": (TO_THE_FIRST_MATRIX, ("compare", "base", "tuned")),
}


def main() -> None:
    arguments = parse_arguments(__doc__, repeats=7)
    rows: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for name, scale in (("base", 1.0), ("tuned", 1.1)):
            (Path(folder) / name).mkdir()
            save_file({"layer.0.dense.weight": scale * torch.eye(8)}, Path(folder) / name / "model.safetensors")
        for _ in range(arguments.repeats):
            for name, (program, words) in ROWS.items():
                for field, value in timed(program, words, folder).items():
                    rows[name][field] = min(value, rows[name].get(field, value))
    found = [{"what": name, **row} for name, row in rows.items()]
    write("start_up", {"settings": {"repeats": arguments.repeats}, "rows": found, **environment()})


def timed(program: str, words: tuple[str, ...], folder: str) -> dict[str, float]:
    """Seconds of the clock and of the processor that a fresh interpreter takes for a program."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", program, *words], cwd=folder, capture_output=True, check=False)
    after, ended = os.times(), time.perf_counter()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": ended - started, "processor_seconds": processor}


if __name__ == "__main__":
    main()
