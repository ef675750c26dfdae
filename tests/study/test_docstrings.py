"""The examples in the docstrings of `spectralbasis.training` give what they say."""

import doctest
from importlib import import_module

import pytest

from spectralbasis import training
from spectralbasis.extras import listed_by_group
from spectralbasis.training import METHODS
from spectralbasis.training.known_tasks import TASKS


@pytest.mark.parametrize("name", [name for name in training.__all__ if name != "METHODS"])
def test_every_public_name_has_an_example_that_runs(name, monkeypatch):
    saved = [(known, dict(known)) for known in (METHODS, TASKS)]
    found = getattr(training, name)
    examples = doctest.DocTestFinder(recurse=False).find(
        found,
        name,
        globs={**vars(import_module(found.__module__)), **{one: getattr(training, one) for one in training.__all__}},
    )
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    results = [runner.run(example) for example in examples]
    for known, entries in saved:
        known.clear()
        known.update(entries)
    assert sum(result.attempted for result in results) > 0, f"{name} has no example"
    assert sum(result.failed for result in results) == 0


def test_lists_by_group():
    assert listed_by_group([("a", "x"), ("b", "y"), ("a", "z")]) == "x, z (a); y (b)"
