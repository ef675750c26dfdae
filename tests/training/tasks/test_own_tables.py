"""A user's tables as tasks: what is found, what is held out, and what is refused with its place."""

import json
import re

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from spectralbasis.errors import InputError
from spectralbasis.training import Task, task_from_table
from spectralbasis.training.own_tasks import scored_task
from spectralbasis.training.row_values import is_number
from spectralbasis.training.table_files import open_tables

FILMS = [("good film", "yes"), ("bad film", "no"), ("so, so", "NA"), ('a "quote"', "None")] * 5


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def csv_text(rows=FILMS, header=("text", "label"), separator=",", end="\n"):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if set(text) & set(f'{separator}"\n') else text

    return "".join(separator.join(map(cell, row)) + end for row in [header, *rows])


def as_jsonl(path):
    lines = [json.dumps({"text": text, "label": label}) for text, label in FILMS]
    return write(path / "t.jsonl", "\n".join(lines))


def as_parquet(path):
    pd.DataFrame(FILMS, columns=["text", "label"]).to_parquet(path / "t.parquet")
    return path / "t.parquet"


def as_dataset(path):
    names = ["yes", "no", "NA", "None"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    rows = {"text": [text for text, _ in FILMS], "label": [names.index(label) for _, label in FILMS]}
    DatasetDict({"train": Dataset.from_dict(rows, features=features)}).save_to_disk(path / "set")
    return path / "set"


def as_folder(path):
    (path / "folder").mkdir()
    write(path / "folder" / "train.csv", csv_text())
    return path / "folder"


SAME = {
    "csv": lambda path: write(path / "t.csv", csv_text()),
    "bom": lambda path: write(path / "t.csv", csv_text(), "utf-8-sig"),
    "utf16": lambda path: write(path / "t.tsv", csv_text(separator="\t", rows=FILMS), "utf-16"),
    "crlf": lambda path: write(path / "t.csv", csv_text(end="\r\n")),
    "semicolons": lambda path: write(path / "t.csv", csv_text(separator=";")),
    "excel": lambda path: write(path / "t.csv", "sep=;\n" + csv_text(separator=";")),
    "blank lines first": lambda path: write(path / "t.csv", "\n\n" + csv_text(separator=";")),
    "empty rows of Excel": lambda path: write(path / "t.csv", csv_text() + ",\n\n"),
    "tsv with quoted fields": lambda path: write(path / "t.tsv", csv_text(separator="\t")),
    "tsv with quotes as text": lambda path: write(
        path / "t.tsv", "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *FILMS])
    ),
    "other order": lambda path: write(path / "t.csv", csv_text([row[::-1] for row in FILMS], ("label", "text"))),
    "jsonl": as_jsonl,
    "parquet": as_parquet,
    "data set": as_dataset,
    "folder": as_folder,
}


def all_rows(task):
    names = task.train.features["label"].names if "label" in task.train.features else None
    return sorted(
        (row["text"], names[row["label"]]) for part in (task.train, task.evaluation) for row in part
    )  # fmt: skip


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_every_form_of_a_table_gives_the_same_words(tmp_path, make):
    task = task_from_table(make(tmp_path))
    assert (task.kind, task.label_names) == ("classification", ("NA", "None", "no", "yes"))
    assert all_rows(task) == sorted(FILMS)
    assert len(task.evaluation) == 4  # one of each class


def test_a_text_may_hold_line_breaks_and_a_later_row_is_named_by_its_own_line(tmp_path):
    rows = [("first\nsecond", "yes"), ("bad", "no"), ("", "no")]
    file = write(tmp_path / "t.csv", csv_text(rows))
    with pytest.raises(InputError, match=r"t\.csv, line 5, column 'text': the text is empty, as in 1 of 3 rows"):
        task_from_table(file)
    task = task_from_table(write(file, csv_text([*rows, *rows[:2] * 10])))
    assert len(task.train) + len(task.evaluation) == 22
    assert task.notes[1].endswith("t.csv, line 5, column 'text': the text is empty; 1 row without text is left out.")


def test_texts_of_several_lines_and_labels_that_look_alike_are_said(tmp_path):
    rows = [("first\nsecond", "TRUE"), ("b", "FALSE"), ("c", "True"), ("d", "False")] * 2
    notes = task_from_table(write(tmp_path / "t.csv", csv_text(rows))).notes
    assert any("2 texts span several lines, the first in line 2;" in note for note in notes)
    assert any("'FALSE' and 'False' are two classes" in note for note in notes)


def test_the_split_is_seeded_and_stated_and_can_be_scored_again(tmp_path):
    file = write(tmp_path / "t.csv", csv_text(FILMS * 10))
    first, again, other = (task_from_table(file, seed=seed) for seed in (3, 3, 4))
    assert first.evaluation["text"][:] == again.evaluation["text"][:]
    assert (
        sorted(first.evaluation["label"]) == sorted(other.evaluation["label"]) == [n for n in range(4) for _ in "12345"]
    )
    assert "20 of 200 examples are held out at random (seed 3), with each class in both parts," in first.notes[-2]
    scored = scored_task(file, first.layout, held_out=True)
    assert scored.evaluation["text"][:] == first.evaluation["text"][:]
    write(file, csv_text(FILMS * 11))
    with pytest.raises(InputError, match="has 220 rows, and 200 when the model was tuned"):
        scored_task(file, first.layout, held_out=True)


def test_labels_keep_the_order_of_the_tuning(tmp_path):
    train = task_from_table(write(tmp_path / "t.csv", csv_text()))
    test = scored_task(write(tmp_path / "u.csv", csv_text([("x", "yes"), ("y", "NA")])), train.layout)
    assert test.evaluation["label"][:] == [3, 0]
    assert test.label_names == train.label_names


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["0.5", "1", "-2e-1", ".5"], "regression", ("label",)),
        (["007", "012"], "classification", ("007", "012")),
        (["True", "False"], "classification", ("False", "True")),
        (["nan", "inf"], "classification", ("inf", "nan")),
        (["NULL", ""], None, "the label is empty, expected a word or a number"),
        (["2,5", "3,5"], None, "write numbers with a point"),
        ([*map(str, range(50)), "many"], None, "50 of 51 labels are numbers|250 of 255 labels are numbers"),
    ],
)
def test_what_labels_are(tmp_path, labels, kind, names):
    rows = [(f"text {number}", label) for number, label in enumerate(labels * 5)]
    file = write(tmp_path / "t.csv", csv_text(rows))
    if kind is None:
        with pytest.raises(InputError, match=names):
            task_from_table(file)
    else:
        task = task_from_table(file)
        assert (task.kind, task.label_names) == (kind, names)


def test_numbers_are_a_regression_unless_they_are_said_to_be_classes(tmp_path):
    file = write(tmp_path / "t.csv", csv_text([("a", "10"), ("b", "9"), ("c", "9"), ("d", "10")] * 3))
    assert any("pass --kind classification" in note for note in task_from_table(file).notes)
    task = task_from_table(file, kind="classification")
    assert (task.kind, task.label_names) == ("classification", ("9", "10"))


def test_a_regression_is_learned_in_its_own_unit(tmp_path):
    task = task_from_table(write(tmp_path / "t.csv", csv_text([("a", "1000"), ("b", "3000")] * 10)), kind="regression")
    assert (task.layout.center, task.layout.scale) == (2000, 1000)
    assert {*task.train["label"], *task.evaluation["label"]} == {-1, 1}


@pytest.mark.parametrize(
    ("header", "text"),
    [(("a", "b", "label"), None), (("premise", "hypothesis", "label"), ("premise", "hypothesis")),
     (("Text", "more", "Label"), ("Text",)), (("more", "", "label"), ("more",))],
)  # fmt: skip
def test_columns_are_found_by_name_or_refused(tmp_path, header, text):
    file = write(tmp_path / "t.csv", csv_text([(f"u{n}", f"v{n}", f"w{n % 2}") for n in range(20)], header))
    if text is None:
        with pytest.raises(InputError, match="several columns could hold the text: 'a', 'b', 'label'; name one"):
            task_from_table(file)
        assert task_from_table(file, text=["b", "a"]).layout.text == ("b", "a")
    else:
        assert task_from_table(file).layout.text == text


BAD = {
    "missing column": (csv_text(), {"label": "stars"}, r"t\.csv has no column 'stars'; its columns are 'text', '"),
    "empty": ("", {}, "is empty"),
    "header only": ("text,label\n", {}, "has a header .* and no rows"),
    "no labels": ("text,more\na,b\n", {"text": "more", "kind": "classification"}, "no column of labels"),
    "once": (csv_text([*FILMS, ("x", "rare")]), {}, r"line 22, column 'label': the label 'rare' occurs once"),
    "one class": (csv_text([("a", "x"), ("b", "x")]), {}, "every label in the column 'label' is 'x'"),
    "blank text": (csv_text([*FILMS, *[("  ", "yes")] * 9]), {}, r"line 22, column 'text': the text is empty, as"),
    "broken quotes": ('text,label\n"open,yes\nb,no\n', {}, "the row that begins in line 2 cannot be read"),
    "inner quotes": ('text,label\na,no\n"say "hi" now",yes\n', {}, "the row that begins in line 3 cannot be read"),
    "ragged": ("text,label\na,b,c\n", {}, "line 2 has 3 columns where the header has 2"),
    "twice": ("text,label,text\na,b,c\nd,e,f\n", {}, "has the column 'text' twice"),
    "unknown kind": (csv_text(), {"kind": "ranking"}, "unknown kind 'ranking'; the known ones are"),
    "no text left": ("label\na\nb\n", {}, "several columns could hold the text"),
    "words for numbers": (csv_text(), {"kind": "regression"}, r"line 2, column 'label': the label is 'yes', ex"),
    "same column": (csv_text(), {"text": ("text", "text")}, "the column 'text' was named twice"),
    "NUL": ("text,label\na\0b,yes\n", {}, "line 2 holds the character NUL"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "options", "message"), BAD.values(), ids=BAD)
def test_bad_tables_are_refused_with_file_row_and_column(tmp_path, content, options, message):
    with pytest.raises(InputError, match=message) as caught:
        task_from_table(write(tmp_path / "t.csv", content), **options)
    assert "t.csv" in str(caught.value) or "kind" in message


BAD_JSON = {
    "mixed labels": ('{"text": "a", "label": "1"}\n{"text": "b", "label": true}', r"line 2.*is True, true or"),
    "number as text": ('{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}', r"line 2, column 'text': found 5, a"),
    "NaN": ('{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}', r"line 2, column 'label': the label is nan"),
    "no object": ('{"text": "a", "label": "x"}\n[1]', "line 2 is a list, expected a JSON object"),
    "no JSON": ('{"text": "a", "label": "x"}\n{"text', "line 2 is not valid JSON"),
    "a list": ('[{"text": "a", "label": "x"}]', "is one JSON list; write one object a line"),
    "missing value": ('{"text": "a", "label": "x"}\n{"label": "x"}', r"line 2, column 'text': the text is empty, as"),
    "half a character": ('{"text": "\\ud800", "label": "x"}', r"line 1 holds half a character"),
    "forms": ('{"prompt": "a", "completion": "b"}\n{"prompt": [{"role": "user", "content": "c"}], "completion": "d"}',
              r"line 2, column 'prompt': found a list, where the rows before have a text"),
    "role": ('{"messages": [{"role": "robot", "content": "a"}]}', r"line 1, column 'messages': found the message"),
    "no answer": ('{"messages": [{"role": "user", "content": "a"}]}', "whose last one is the assistant's answer"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_lines_of_json_are_refused_with_their_number(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        task_from_table(write(tmp_path / "t.jsonl", content))


def test_a_label_that_training_lacks_is_refused(tmp_path):
    train = write(tmp_path / "t.csv", csv_text())
    new = write(tmp_path / "v.csv", csv_text([("a", "yes"), ("b", "maybe")]))
    with pytest.raises(
        InputError, match=r"v\.csv, line 3, column 'label': the label is 'maybe', which .*t\.csv does not"
    ):
        task_from_table(train, new)
    other = write(tmp_path / "w.csv", csv_text(header=("words", "label")))
    with pytest.raises(InputError, match=r"w\.csv has no column 'text'; .*t\.csv has it, so give the tables the same"):
        task_from_table(train, other)


def test_other_encodings_are_refused_with_the_line(tmp_path):
    file = write(tmp_path / "t.csv", csv_text([("good", "yes"), ("gut für", "no")]), "latin-1")
    with pytest.raises(InputError, match=r"t\.csv, line 3 is not UTF-8 text .*'CSV UTF-8'"):
        task_from_table(file)


def test_missing_labels_of_a_parquet_file_are_refused_with_the_row(tmp_path):
    pd.DataFrame({"text": ["a", "b"], "label": [1.5, None]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t\.parquet, row 2, column 'label': the label is (nan|empty)"):
        task_from_table(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "do not exist"),
        ("t.xlsx", "save an Excel sheet as 'CSV UTF-8'"),
        ("t.parquet", "cannot be read as a P"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, name, message):
    if name != "none.csv":
        write(tmp_path / name, "nothing")
    with pytest.raises(InputError, match=message):
        task_from_table(tmp_path / name)


def test_a_saved_data_set_that_names_files_elsewhere_is_refused(tmp_path):
    folder = as_dataset(tmp_path)
    state = folder / "train" / "state.json"
    state.write_text(re.sub(r"data-[^\"]+", "../../../t.arrow", state.read_text()))
    with pytest.raises(InputError, match="leads out of"):
        task_from_table(folder)


def test_a_folder_of_pictures_for_each_class(tmp_path):
    for number in range(12):
        place = tmp_path / "pictures" / ("dark", "bright")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 255 * (number % 2)).save(place / f"{number}.png")
    task = task_from_table(tmp_path / "pictures")
    assert (task.modality, task.label_names, len(task.train), len(task.evaluation)) == (
        "image", ("bright", "dark"), 10, 2
    )  # fmt: skip
    assert {(row["image"].getextrema()[1], row["label"]) for row in task.train} == {(0, 1), (255, 0)}
    write(tmp_path / "pictures" / "dark" / "zero.png", "none")
    with pytest.raises(InputError, match=r"zero\.png cannot be read as a picture"):
        task_from_table(tmp_path / "pictures")


def test_running_text_and_instructions(tmp_path):
    text = task_from_table(write(tmp_path / "t.txt", "one two three\n\nfour five six\n" * 20))
    assert (text.kind, len(text.train), len(text.evaluation)) == ("masked_language", 36, 4)
    pairs = "\n".join(json.dumps({"prompt": f"p{n}", "completion": f"c{n}"}) for n in range(10))
    asked = task_from_table(write(tmp_path / "t.jsonl", pairs))
    assert (asked.kind, asked.inputs) == ("instructions", ("prompt", "completion"))


def test_texts_in_memory():
    task = Task.from_texts("films", (["good", "bad"], ["yes", "no"]), (["fine"], ["yes"]))
    assert (task.label_names, task.evaluation[0]) == (("no", "yes"), {"text": "fine", "label": 1})
    with pytest.raises(InputError, match="no text to train on has the label 'maybe'"):
        Task.from_texts("films", (["good"], ["yes"]), (["fine"], ["maybe"]))


@pytest.mark.parametrize(
    ("value", "expected"),
    [("1", True), ("-0.5", True), (" 2 ", True), ("1e3", True), (".", False), ("", False), ("1e", False), ("01", False),
     ("１", False), (True, False), (2, True), (None, False)],
)  # fmt: skip
def test_what_writes_a_number(value, expected):
    assert is_number(value) is expected


def test_rows_are_read_one_after_another(tmp_path):
    rows = open_tables(write(tmp_path / "t.csv", csv_text([*FILMS, ("a", "b", "c")])))[""].read()
    assert next(rows) == (2, ["good film", "yes"])


def test_one_of_several_data_sets_in_a_folder_is_named_after_a_colon(tmp_path):
    for name in ("films", "books"):
        (tmp_path / name).mkdir()
        for split, rows in (("train", 20), ("test", 4)):
            lines = "".join(f"{name} {number},{('bad', 'good')[number % 2]}\n" for number in range(rows))
            (tmp_path / name / f"{split}.csv").write_text("text,label\n" + lines)
    files = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train.csv\n"
        f"  - split: test\n    path: {name}/test.csv\n"
        for name in ("films", "books")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    tables = open_tables(f"{tmp_path}:books")
    assert {split: len(list(table.read())) for split, table in tables.items()} == {"train": 20, "test": 4}
    assert next(tables["test"].read())[1] == ["books 0", "bad"]
    for place in (tmp_path, f"{tmp_path}:film"):
        with pytest.raises(InputError, match=r"holds 2 data sets \(films, books\); name one after a colon: .*:films"):
            open_tables(place)


def test_the_share_of_the_commonest_label_is_said(tmp_path):
    rows = [(f"film {number}", "no" if number % 4 else "yes") for number in range(8)]
    file = write(tmp_path / "t.csv", csv_text(rows))
    task = task_from_table(file, file)
    said = "The commonest label, 'no', is that of 75% of the scored rows."
    assert (task.notes[-1], scored_task(file, task.layout).notes[-1]) == (said, said)
