"""Any name stays text, whatever it is written into."""

import base64
import html
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralbasis.report import embed


@given(
    st.recursive(
        st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_script_reads_back_and_cannot_leave_it(value):
    text = str(embed.script_json(value))
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


@given(st.text())
def test_a_plotly_label_has_no_tag_no_tex_and_decodes_to_the_name(name):
    text = embed.plotly_text(name)
    assert not set("<>$") & set(text)
    assert html.unescape(text) == html.unescape(html.escape(name, quote=False))


def test_numbers_that_json_lacks_become_null():
    assert embed.rounded([1.234567, np.nan, -np.inf, 0.0]) == [1.2346, None, None, 0.0]
    with pytest.raises(ValueError, match="JSON"):
        embed.script_json(float("nan"))


def test_packed_numbers_are_little_endian_single_floats():
    assert base64.b64decode(embed.packed([[1.0, -2.0]])) == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/runs/a/rte", "/runs/a/sst2"], ["rte", "sst2"]),
        (["/runs/a/rte", "/runs/b/rte"], ["/runs/a/rte", "/runs/b/rte"]),
        (["/"], ["/"]),
    ],
)
def test_names_are_cut_to_their_last_part_where_that_tells_them_apart(names, short):
    assert embed.short_names(names) == short
