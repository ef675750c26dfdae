"""The command line survives what machines do: a few tries of what `python -m benchmarks.faults` tries at length."""

import pytest
from benchmarks.faults.bench import Bench
from benchmarks.faults.case import complaints
from benchmarks.faults.cases import CASES

QUICK = [case for case in CASES if case.few is not None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.group}: {case.name}")
def test_nothing_is_lost_and_everyone_is_told(bench, case):
    assert complaints(case, list(case.trials(bench, case.few))) == []
