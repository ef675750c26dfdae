"""Every public function and class shows how it is called, and the examples in docstrings print what they say."""

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest

import spectralbasis
from spectralbasis.checkpoints.opening import FORMATS
from spectralbasis.extras import listed_by_group
from spectralbasis.locations import SUFFIXES
from spectralbasis.training import METHODS
from spectralbasis.training.known_tasks import TASKS

NAMESPACES = ("spectralbasis", "spectralbasis.linalg", "spectralbasis.training")
MODULES = [
    found.name
    for found in pkgutil.walk_packages(spectralbasis.__path__, "spectralbasis.")
    if found.name != "spectralbasis.__main__"
]
RETURNED = {
    "spectralbasis.Combination",
    "spectralbasis.Extraction",
    "spectralbasis.LoraExport",
    "spectralbasis.MergedExport",
    "spectralbasis.Similarity",
    "spectralbasis.SpectralModel",
    "spectralbasis.linalg.LeadingSVD",
    "spectralbasis.training.EvaluateResult",
    "spectralbasis.training.LoadedModel",
    "spectralbasis.training.ParameterCounts",
    "spectralbasis.training.PredictResult",
    "spectralbasis.training.TuneResult",
}
"""Classes that nobody makes by hand: the function that returns one has the example."""


def public_objects():
    """Functions and classes of the public namespaces by their full names."""
    for namespace in NAMESPACES:
        module = import_module(namespace)
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isfunction(found) or (inspect.isclass(found) and not issubclass(found, Exception)):
                yield f"{namespace}.{name}", found


OBJECTS = dict(public_objects())


@pytest.fixture
def registries():
    """What an example registers is gone after it."""
    saved = [(known, known.copy()) for known in (METHODS, TASKS, SUFFIXES)]
    formats = FORMATS.copy()
    yield
    FORMATS[:] = formats
    for known, entries in saved:
        known.clear()
        known.update(entries)


def examples_of(name, found):
    """The examples of a public object, in which all names of its namespace are known."""
    names = vars(import_module(name.rpartition(".")[0]))
    finder = doctest.DocTestFinder(recurse=inspect.isclass(found))
    return [test for test in finder.find(found, name, globs={**names, found.__name__: found}) if test.examples]


@pytest.mark.parametrize("name", sorted(set(OBJECTS) - RETURNED))
def test_a_public_name_has_an_example_that_holds(name, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for test in examples_of(name, OBJECTS[name]):
        runner.run(test, out=said.append)
    assert runner.tries > 0, f"{name} has no example"
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_other_names_hold(name, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    public = {id(found) for found in OBJECTS.values()}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for own, found in vars(module).items():
        if getattr(found, "__module__", None) == name and id(found) not in public and callable(found):
            for test in doctest.DocTestFinder().find(found, own, module=module):
                runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_lists_by_group():
    assert listed_by_group([("a", "x"), ("b", "y"), ("a", "z")]) == "x, z (a); y (b)"
