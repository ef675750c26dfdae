"""Amounts of memory as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.errors import InputError
from spectralbasis.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), (" 4096 ", 4096), (4096, 4096), (".5kB", 500)],
)
def test_sizes_are_read(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "8 gigabytes", "-1GB", "0", "1e9", 0, -5, 1.5e300, "9" * 400, "9" * 400 + "TB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="pass bytes, or a number with a unit"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_a_size_rounded_upwards_is_enough(count):
    assert count <= parse_size(format_size(count, up=True)) <= 1.1 * count + 1
    assert parse_size(format_size(count)) == pytest.approx(count, rel=0.06)


def test_sizes_have_the_unit_that_suits_them():
    assert [format_size(count) for count in (1, 999, 1000, 1_540_000, 2 * 10**12)] == [
        "1B",
        "999B",
        "1kB",
        "1.5MB",
        "2TB",
    ]
