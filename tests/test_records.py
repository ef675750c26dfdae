"""JSON is bounded, unambiguous and of the expected shape before anything uses it."""

import json
import os
from pathlib import Path
from typing import Any, NotRequired

import pytest
from typing_extensions import TypedDict

from spectralbasis.errors import InputError
from spectralbasis.printable import in_code, in_markdown, in_markup, printable, shortened, warn
from spectralbasis.records import LARGEST, Count, Finite, Positive, checked, parse_json, read_record


class Planet(TypedDict):
    name: str
    moons: int
    radius: float
    orbits: NotRequired[tuple[int, ...]]


EARTH = {"name": "Earth", "moons": 1, "radius": 6371, "orbits": [3, 4]}


def test_what_fits_is_returned_with_lists_as_tuples_and_whole_numbers_as_floats() -> None:
    assert checked(EARTH, Planet, "planet") == {"name": "Earth", "moons": 1, "radius": 6371.0, "orbits": (3, 4)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moons": 1.5}, "planet: moons is 1.5, expected a valid integer"),
        ({"moons": True}, "planet: moons is True, expected a valid integer"),
        ({"moons": "1"}, "planet: moons is '1', expected a valid integer"),
        ({"radius": "6371"}, "planet: radius is '6371', expected a valid number"),
        ({"name": None}, "planet: name is None, expected a valid string"),
        ({"orbits": [1, "a"]}, "planet: orbits[1] is 'a', expected a valid integer"),
    ],
)
def test_a_difference_is_one_sentence_with_field_value_and_expectation(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as raised:
        checked({**EARTH, **change}, Planet, "planet")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("schema", "content", "said"),
    [
        (int | str, 1.5, "the whole is 1.5, expected a valid integer or a valid string"),
        (dict[str, list[int] | int], {"a": [1, "b"]}, "a[1] is 'b', expected a valid integer"),
        (dict[str, bool], {"a": 1}, "a is 1, expected true or false"),
        (list[dict[str, int]], [3], "[0] is 3, expected an object"),
        (tuple[int, int], [1, 2, 3], "the whole is [1, 2, 3], expected at most 2 items"),
        (tuple[int, int], [1], "[1] is missing"),
        (Finite, float("nan"), "the whole is nan, expected a finite number"),
        (dict[str, Finite], {"a": 10**400}, "expected a finite number"),
        (Count, -1, "the whole is -1, expected at least 0"),
        (Count, 10**30, "expected at most 9223372036854775807"),
        (Positive, 0, "expected at least 1"),
    ],
)
def test_what_is_expected_is_said_plainly(schema: Any, content: object, said: str) -> None:
    with pytest.raises(InputError) as raised:
        checked(content, schema, "it")
    assert said in str(raised.value)


def test_names_that_are_no_utf8_are_spelled_out() -> None:
    assert checked({"\udcff": "a\ud800"}, dict[str, str], "it") == {r"\udcff": r"a\ud800"}


@pytest.mark.parametrize("depth", [500, 100_000])
def test_content_of_any_depth_is_refused_in_a_sentence(depth: int) -> None:
    content: object = 1
    for _ in range(depth):
        content = [content]
    with pytest.raises(InputError, match="nested too deeply"):
        checked(content, dict[str, int], "it")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InputError, match="planet: moons is missing"):
        checked({"name": "Earth", "radius": 1}, Planet, "planet")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "'a' is given twice, as 1 and as 2"),
        ("{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_json_that_cannot_be_trusted_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_json(text, "the file")


def test_a_key_given_twice_with_one_value_is_harmless() -> None:
    assert parse_json('{"a": [1], "a": [1]}', "the file") == {"a": [1]}


def test_files_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.json"
    with sparse.open("wb") as file:
        file.truncate(LARGEST + 1)
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    for path, said in (
        (sparse, "expected at most"),
        (pipe, "not a regular file"),
        (tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(InputError, match=said):
            read_record(path, Planet)


def test_a_record_is_read_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "planet.json").write_text(json.dumps(EARTH))
    assert read_record(tmp_path / "planet.json", Planet)["moons"] == 1


def test_text_reaches_each_place_without_what_acts_there() -> None:
    hostile = "\x1b]0;owned\x07\u202e[red]*b*\ud800\r\n"
    assert printable(hostile) == r"\x1b]0;owned\x07\u202e[red]*b*\ud800\r\n"
    assert in_markup("[red]a") == r"\[red]a"
    assert in_markdown("[a](b)\nd") == r"\[a\](b)" + "\\" * 2 + "nd"
    assert len(shortened("a" * 10_000, 100)) < 102


def test_messages_of_errors_are_one_printable_paragraph() -> None:
    error = InputError("the name \x1b[31mred\n  error: forged " + "a" * 1_000_000)
    assert "\x1b" not in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 5000


def test_a_span_of_code_holds_any_text() -> None:
    assert in_code("a") == "`a`"
    assert in_code("`a``b`\n") == "``` `a``b`\\n ```"
    assert in_code("``") == "``` `` ```"


def test_a_warning_is_printable() -> None:
    with pytest.warns(UserWarning, match=r"a \\x1b\[31mname"):
        warn("a \x1b[31mname")
