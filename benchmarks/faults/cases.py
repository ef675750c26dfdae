"""All faults."""

from benchmarks.faults import damaged, full, interrupted, killed, starved
from benchmarks.faults.case import Case

CASES: tuple[Case, ...] = (*killed.CASES, *full.CASES, *damaged.CASES, *interrupted.CASES, *starved.CASES)
