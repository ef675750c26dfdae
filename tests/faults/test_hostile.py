"""Readers survive files that were changed to fool them: a few tries of what `python -m benchmarks.hostile` tries."""

from itertools import islice

import pytest
from benchmarks.faults.bench import Bench
from benchmarks.hostile.subjects import SUBJECTS
from benchmarks.hostile.trials import complaints, trials

QUICK = "checkpoint, safetensors", "data set, TSV"
"""What is tried in the default suite too: a reader of a command, and one of a function."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize(
    "subject",
    [pytest.param(one, id=one.name, marks=() if one.name in QUICK else pytest.mark.slow) for one in SUBJECTS],
)
def test_every_change_is_refused_or_harmless(bench, subject):
    assert complaints(list(islice(trials(subject, bench), subject.quick))) == []
