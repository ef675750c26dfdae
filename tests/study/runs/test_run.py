"""Runs are told apart by their content."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.study.runs import Run, with_needs

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)
)


@given(settings=st.dictionaries(st.text(max_size=3), JSON, max_size=4), seed=st.integers(0, 3))
def test_the_order_of_settings_does_not_matter(settings, seed):
    assert Run("a", settings, seed) == Run("a", dict(reversed(settings.items())), seed)


@pytest.mark.parametrize(
    "other",
    [
        Run("b", {"rate": 1}, 0),
        Run("a", {"rate": 2}, 0),
        Run("a", {"rate": 1}, 1),
        Run("a", {"rate": 1}, 0, {"base": Run("b", {})}),
    ],
)
def test_another_content_is_another_run(other):
    run = Run("a", {"rate": 1}, 0)
    assert run != other
    assert run.key != other.key


def test_needs_differ_by_their_content_and_role():
    first, second = Run("base", {"size": 1}), Run("base", {"size": 2})
    runs = [Run("a", {}, 0, {"base": first}), Run("a", {}, 0, {"base": second}), Run("a", {}, 0, {"other": first})]
    assert len({run.key for run in runs}) == 3


def test_nothing_that_json_cannot_say_is_a_setting():
    with pytest.raises(ValueError, match="JSON"):
        _ = Run("a", {"rate": math.nan}).key


def test_needs_come_first_and_once():
    base = Run("base", {})
    middle = Run("middle", {}, 0, {"base": base})
    leaf = Run("leaf", {}, 0, {"middle": middle, "base": base})
    assert list(with_needs([leaf, middle, base])) == [base, middle, leaf]
