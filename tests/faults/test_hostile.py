"""Readers survive files that were changed to fool them: a few tries of what `python -m benchmarks.hostile` tries."""

from itertools import islice

import pytest
from benchmarks.faults.bench import Bench
from benchmarks.hostile.subjects import SUBJECTS
from benchmarks.hostile.trials import complaints, trials


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("hostile"))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_every_change_is_refused_or_harmless(bench, subject):
    assert complaints(list(islice(trials(subject, bench), subject.quick))) == []
