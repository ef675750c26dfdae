"""Tries every fault and writes what became of each: `python -m benchmarks.faults`.

Writes benchmarks/results/faults.json, from which `python -m benchmarks.tables` makes the tables in
docs/reliability.md. `--only WORD` tries the cases whose group or name holds the word, and keeps the others' results.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import complaints, summary
from benchmarks.faults.cases import CASES
from benchmarks.results import environment, parse_arguments, read, write


def main() -> None:
    arguments = parse_arguments(__doc__, only="")
    if not arguments.only:
        write("faults", {"rows": [], **environment()})
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for case in CASES:
            if arguments.only not in f"{case.group} {case.name}":
                continue
            started = time.perf_counter()
            trials = list(case.trials(bench, case.many))
            seconds = time.perf_counter() - started
            print(f"{case.group}: {case.name}: {len(trials)} tries, {seconds:.0f} s", file=sys.stderr)
            for complaint in complaints(case, trials):
                print(f"  {complaint}", file=sys.stderr)
            keep(summary(case, trials))


def keep(row: dict[str, Any]) -> None:
    """Put a case's row among those of the others, in the order of the cases."""
    rows = {(one["group"], one["name"]): one for one in [*read("faults")["rows"], row]}
    order = [(case.group, case.name) for case in CASES]
    write("faults", {"rows": [rows[key] for key in order if key in rows], **environment()})


if __name__ == "__main__":
    main()
