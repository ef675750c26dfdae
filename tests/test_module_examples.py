"""The examples in docstrings run and print what they say."""

import doctest
from importlib import import_module

import pytest

MODULES = (
    "basis",
    "checkpoints.names",
    "checkpoints.opening",
    "linalg.certificates",
    "linalg.row_blocks",
    "linalg.subspaces",
    "linalg.svd",
    "linalg.thresholds",
    "printable",
    "records",
    "sizes",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name):
    result = doctest.testmod(import_module(f"spectralbasis.{name}"), optionflags=doctest.IGNORE_EXCEPTION_DETAIL)
    assert result.failed == 0
    assert result.attempted > 0
