"""The command line survives what machines do: a few tries of what `python -m benchmarks.faults` tries at length."""

import pytest
from benchmarks.faults.bench import Bench
from benchmarks.faults.case import complaints
from benchmarks.faults.cases import CASES

FIRST, *OTHERS = [case for case in CASES if case.few is not None]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"))


def name(case):
    return f"{case.group}: {case.name}"


@pytest.mark.parametrize(
    "case",
    [pytest.param(FIRST, id=name(FIRST)), *(pytest.param(one, id=name(one), marks=pytest.mark.slow) for one in OTHERS)],
)
def test_nothing_is_lost_and_everyone_is_told(bench, case):
    assert complaints(case, list(case.trials(bench, case.few))) == []
