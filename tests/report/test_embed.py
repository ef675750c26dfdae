"""Any name stays text, whatever it is written into."""

import base64
import html
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from spectralbasis.report import results

VISIBLE = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")))


@given(
    st.recursive(VISIBLE | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(VISIBLE, inner))
)
def test_json_in_a_script_reads_back_and_cannot_leave_it(value):
    text = str(results.script_json(value))
    assert json.loads(text) == value
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_what_a_reader_cannot_see_is_spelled_out_in_json_and_templates():
    hostile = "a\u202eb\x1b\ud800\tc"
    assert json.loads(str(results.script_json({hostile: [hostile]}))) == {
        "a\\u202eb\\x1b\\ud800\tc": ["a\\u202eb\\x1b\\ud800\tc"]
    }
    shown = results.environment().from_string("{{ name }}{{ markup }}").render(name=f"<{hostile}", markup=Markup("<b>"))
    assert shown == "&lt;a\\u202eb\\x1b\\ud800\tc<b>"


def test_a_label_is_not_taken_for_a_colour_of_the_page():
    assert not results.plotly_text("var(--ink)").startswith("var(")
    assert html.unescape(results.plotly_text("var(--ink)")) == "var(--ink)"


@given(st.text())
def test_a_plotly_label_has_no_tag_no_tex_and_decodes_to_the_name(name):
    text = results.plotly_text(name)
    assert not set("<>$") & set(text)
    assert html.unescape(text) == html.unescape(html.escape(name, quote=False))


def test_numbers_that_json_lacks_become_null():
    assert results.rounded([1.234567, np.nan, -np.inf, 0.0]) == [1.2346, None, None, 0.0]
    with pytest.raises(ValueError, match="JSON"):
        results.script_json(float("nan"))


def test_packed_numbers_are_little_endian_single_floats():
    assert base64.b64decode(results.packed([[1.0, -2.0]])) == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["/runs/a/rte", "/runs/a/sst2"], ["rte", "sst2"]),
        (["/runs/a/rte", "/runs/b/rte"], ["/runs/a/rte", "/runs/b/rte"]),
        (["/"], ["/"]),
    ],
)
def test_names_are_cut_to_their_last_part_where_that_tells_them_apart(names, short):
    assert results.short_names(names) == short
