"""Changes small real files of every kind that is read, and judges what each reader makes of them.

Writes benchmarks/results/hostile.json, from which `python -m benchmarks.tables` makes a table in docs/reliability.md.
`--minutes M` spreads M minutes over all kinds. `--only WORD` tries the kinds whose name holds the word and prints what
is wrong, without writing, as `--keep no` does. `--seed S` starts at another seed, to find what no run has found yet.
"""

import sys
import tempfile
import time
from pathlib import Path

from benchmarks.faults.bench import Bench
from benchmarks.hostile.subjects import SUBJECTS
from benchmarks.hostile.trials import Subject, Trial, complaints, summary, trials
from benchmarks.results import environment, parse_arguments, write


def main() -> None:
    arguments = parse_arguments(__doc__, minutes=10.0, only="", seed=0, keep="yes")
    chosen = [subject for subject in SUBJECTS if arguments.only in subject.name]
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for subject in chosen:
            made = tried(subject, bench, arguments.seed, arguments.minutes * 60 / len(chosen))
            found = complaints(made)
            print(f"{subject.name}: {len(made)} tries, {len(found)} faults", *found, sep="\n  ", file=sys.stderr)
            rows.append(summary(subject, made))
            wrong += len(found)
    if not arguments.only and arguments.keep != "no":
        write("hostile", {"seed": arguments.seed, "rows": rows, **environment()})
    sys.exit(1 if wrong else 0)


def tried(subject: Subject, bench: Bench, seed: int, seconds: float) -> list[Trial]:
    """Tries of a kind for so long."""
    made, started = [], time.monotonic()
    for trial in trials(subject, bench, seed):
        made.append(trial)
        if time.monotonic() - started > seconds:
            break
    return made


if __name__ == "__main__":
    main()
