"""Tasks made of a user's own tables: which columns mean what, which rows are held out, and every row checked.

What is wrong with a row is said with its file, line and column, before anything is trained.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.printable import shortened
from spectralbasis.training.data_files import LARGEST, TaskRecord
from spectralbasis.training.row_values import (
    FEW,
    Blanks,
    alike,
    check_classes,
    check_types,
    class_of,
    input_of,
    kind_of_labels,
    ordered_classes,
    target_of,
    type_of,
)
from spectralbasis.training.table_files import Table, open_tables
from spectralbasis.training.tasks import (
    COMPLETION,
    IMAGE,
    LABEL,
    LIKELIHOOD_METRICS,
    MASK_SEED,
    MESSAGES,
    PAIRED,
    PROMPT,
    TEXT,
    Layout,
    Task,
)
from spectralbasis.training.text_tasks import passages

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

KINDS = ("classification", "regression", "language", "instructions", "images")
LABELS = ("label", "labels", "class", "category", "target", "score")
"""Columns that are taken for the label where none is named, the first that is there."""
TEXTS = ("text", "sentence", "review", "content", "question")
PAIRS = (
    ("sentence1", "sentence2"), ("text1", "text2"), ("text_a", "text_b"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("question", "context"), ("query", "passage"),
)  # fmt: skip
HELD_OUT = 0.1
"""Share of the rows that is held out where no validation rows are given."""
MOST_HELD_OUT = 5000


@dataclass(frozen=True)
class Wanted:
    """What the user says about columns: the kind, the columns of text and the column of labels, each or none."""

    kind: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"unknown kind {self.kind!r}; the known ones are {', '.join(KINDS)}")
        if len(self.text) > 2:
            raise InputError(f"{len(self.text)} columns of text were given, expected one, or two for pairs")


def own_record(
    train: str | Path,
    validation: str | Path | None = None,
    *,
    wanted: Wanted = Wanted(),
    seed: int = 0,
    causal: bool = False,
    cut: "Callable[[str], list[str]]" = passages,
) -> TaskRecord:
    """The record of a task made of a user's tables, of the same kind as those of the named tasks; see `own_task`."""
    return TaskRecord(
        own_name(train),
        "own data",
        "",
        lambda data: own_task(train, validation, wanted=wanted, seed=seed, causal=causal, cut=cut),
    )


def own_task(
    train: str | Path,
    validation: str | Path | None = None,
    *,
    wanted: Wanted = Wanted(),
    seed: int = 0,
    causal: bool = False,
    cut: "Callable[[str], list[str]]" = passages,
) -> Task:
    """A task made of a user's tables.

    Args:
        train: file, folder or hub id of the rows to train on.
        validation: of the rows to score on; None takes the split `validation` of `train`, else holds a tenth of the
            rows out by the seed, in which each class has its share.
        wanted: what the user says about columns; the rest is found.
        seed: of the held-out rows.
        causal: running text is learned by predicting each next token, not hidden ones.
        cut: cuts running text into pieces that the model can read.

    Raises:
        InputError: a file, column or row cannot be used; the message names the place.
    """
    tables = open_tables(train)
    table = tables.get("train") or tables.get("") or only(tables, "train", train)
    table_of_validation = tables.get("validation")
    if validation is not None:
        found = open_tables(validation)
        table_of_validation = found.get("validation") or found.get("") or found.get("test")
        table_of_validation = table_of_validation or only(found, "validation", validation)
    layout = find_layout(table, wanted)
    name = own_name(train)
    notes = [*table.notes, *(table_of_validation.notes if table_of_validation is not None else ())]
    if layout.kind in ("language", "instructions"):
        parts = _language_parts(table, table_of_validation, layout, seed, cut)
    else:
        parts = _labelled_parts(table, table_of_validation, layout, seed)
    layout, rows, held_out = parts.layout, parts.train, parts.evaluation
    split = f"rows held out of {Path(table.place).name}"
    if table_of_validation is not None:
        split = table_of_validation.place
    notes.append(_said(table, layout, causal))
    notes.extend(parts.notes)
    notes.append(_said_of_split(table, table_of_validation, layout, len(rows), len(held_out)))
    notes += _said_of_classes(layout, held_out)
    identity = table.identity and f"{table.identity} {table_of_validation.identity if table_of_validation else ''}"
    return _task(name, layout, rows, held_out, split, causal, identity, tuple(notes))


def task_from_table(
    train: str | Path,
    validation: str | Path | None = None,
    *,
    kind: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    seed: int = 0,
) -> Task:
    """A task made of a table, as `tune(train=...)` makes it; running text is learned by hidden words here.

    Args:
        train: rows to train on: a CSV, TSV, JSON lines, Parquet or text file, a folder of them, a data set that
            `save_to_disk` wrote, a folder with one folder of pictures for each class, or a hub id.
        validation: rows to score on; None takes the split `validation` of `train`, else holds a tenth of its rows out.
        kind: `classification`, `regression`, `language`, `instructions` or `images`; None tells it by the columns.
        text: column of text, or two for pairs; by default found by name.
        label: column of labels; by default found by name.
        seed: of the held-out rows.

    Raises:
        InputError: a file, column or row cannot be used; the message names the place.

    Examples:
        >>> from pathlib import Path
        >>> rows = [("good film", "yes"), ("bad film", "no")] * 10
        >>> _ = Path("films.csv").write_text("text,label\\n" + "".join(f"{text},{label}\\n" for text, label in rows))
        >>> task = task_from_table("films.csv")
        >>> task.label_names, len(task.train), len(task.evaluation)
        (('no', 'yes'), 18, 2)
    """
    require_extra("tune", "task_from_table")
    wanted = Wanted(kind, (text,) if isinstance(text, str) else tuple(text), label)
    return own_record(train, validation, wanted=wanted, seed=seed).load(None)


def scored_task(test: str | Path, layout: Layout, *, causal: bool = False, cut: "Callable[[str], list[str]]" = passages,
              held_out: bool = False) -> Task:  # fmt: skip
    """A task that is only scored: the rows of a table, read as the layout says.

    Args:
        test: file, folder or hub id.
        layout: of the table that the model was tuned on.
        causal: see `own_task`.
        cut: see `own_task`.
        held_out: score those rows alone that `tune` held out of this table.

    Raises:
        InputError: a file, column or row cannot be used, or a label is none of the model's.
    """
    tables = open_tables(test)
    order = ("train", "") if held_out else ("test", "", "validation")
    table = next((tables[one] for one in order if one in tables), None) or only(tables, "test", test)
    if layout.kind in ("language", "instructions"):
        rows, notes = _documents(table, layout, cut)
    else:
        rows, notes = _labelled_rows(table, layout)
    split = table.place
    if held_out:
        drawn = layout.held_out
        if not drawn:
            raise InputError(f"no rows of {test} were held out when the model was tuned; leave out --held-out")
        if drawn["of"] != len(rows):
            raise InputError(
                f"{table.place} has {len(rows)} rows, and {drawn['of']} when the model was tuned, so its held-out rows "
                "are not known; restore the file, or leave out --held-out to score all rows"
            )
        _, chosen = _split(rows, layout.kind, drawn["seed"])
        rows, split = rows.select(chosen), f"rows held out of {Path(table.place).name}"
    notes = [*table.notes, *notes, *_said_of_classes(layout, rows)]
    return _task(own_name(test), layout, rows, rows, split, causal, table.identity, tuple(notes))


def own_name(source: str | Path) -> str:
    """What a task of a user's data is called: its file's name without the suffix, its folder's, or its hub id."""
    path = Path(source)
    return path.stem if path.is_file() else path.resolve().name if path.is_dir() else str(source)


def only(tables: Mapping[str, Table], wanted: str, place: str | Path) -> Table:
    """The one table that there is.

    Raises:
        InputError: there are several.
    """
    if len(tables) > 1:
        raise InputError(f"{place} has no split {wanted!r}; it has {', '.join(tables)}")
    return next(iter(tables.values()))


def find_layout(table: Table, wanted: Wanted, *, labelled: bool = True) -> Layout:
    """Which columns mean what, as the user says or as their names tell; the label's values are not looked at yet.

    Raises:
        InputError: a column that is named or needed is not there, or several could be meant.
    """
    by_name = {name.casefold(): name for name in table.columns}

    def there(*names: str) -> tuple[str, ...]:
        return tuple(by_name[name] for name in names if name in by_name)

    named = (*wanted.text, *([wanted.label] if wanted.label else []))
    for column in named:
        table.position(column)
        if named.count(column) > 1:
            raise InputError(
                f"{table.place}: the column {column!r} was named twice among text and label; name two different ones"
            )
    kind = wanted.kind
    pair = there(PROMPT, COMPLETION)
    conversation = there(MESSAGES) or (pair if len(pair) == 2 or not labelled else ())
    if kind is None and not wanted.label and conversation and not wanted.text:
        kind = "instructions"
    if kind == "instructions":
        text = wanted.text or conversation
        if not text:
            raise InputError(
                f"{table.place} has neither a column 'messages' nor the columns 'prompt' and 'completion'; its columns "
                f"are {table.named()}; name one with --text for messages, or two for prompt and completion"
            )
        return Layout("instructions", text)
    if kind == "images" or (kind is None and table.images and not wanted.text):
        if not table.images:
            raise InputError(f"{table.place} has no column of pictures; give a folder with one folder for each class")
        label = wanted.label or next(iter(there(*LABELS)), None)
        if label is None and labelled:
            raise InputError(
                f"{table.place} has pictures without labels; put those of each class into a folder with its name"
            )
        return Layout("images", (wanted.text or table.images)[:1], label)
    label = wanted.label or next(iter(there(*LABELS)), None)
    if kind == "language" or (kind is None and label is None and labelled and (wanted.text or there("text"))):
        text = wanted.text or there(*TEXTS)[:1] or (table.columns if len(table.columns) == 1 else ())
        if len(text) != 1:
            raise InputError(f"{table.place} needs one column of text; its columns are {table.named()}; pass --text")
        return Layout("language", text)
    if label is None and labelled:
        raise InputError(
            f"{table.place} has no column of labels; its columns are {table.named()}; name it with --label, or pass "
            "--kind language for running text (where the first row is no header, write one)"
        )
    return Layout(kind or "", wanted.text or _texts(table, label, there), label)


def _texts(table: Table, label: str | None, there: Callable[..., tuple[str, ...]]) -> tuple[str, ...]:
    for names in (("text",), *PAIRS, *((name,) for name in TEXTS)):
        found = there(*names)
        if len(found) == len(names):
            return found
    others = [column for column in table.columns if column and column != label]
    if len(others) == 1:
        return (others[0],)
    raise InputError(
        f"{table.place}: several columns could hold the text: {table.named()}; name one with --text, or two for pairs "
        "of texts"
    )


@dataclass(frozen=True)
class _Parts:
    layout: Layout
    train: "Dataset"
    evaluation: "Dataset"
    notes: tuple[str, ...] = ()


def _labelled_parts(table: Table, validation: Table | None, layout: Layout, seed: int) -> _Parts:
    _check_size(table)
    columns, values, numbers, notes = _read(table, layout)
    kind = layout.kind or None
    if kind in (None, ""):
        kind = kind_of_labels(table, layout, values, numbers)
    if kind == "regression":
        targets = [target_of(table, layout, number, value) for number, value in zip(numbers, values, strict=True)]
        if min(targets) == max(targets):
            raise InputError(f"{table.place}: every label in the column {layout.label!r} is {targets[0]:g}")
        layout = replace(layout, kind=kind, label_names=(layout.label or "",))
        layout = replace(layout, center=float(np.mean(targets)), scale=float(np.std(targets)))
        distinct = sorted(set(targets))
        if len(distinct) <= FEW and all(target.is_integer() for target in distinct):
            notes.append(
                f"The labels are the numbers {', '.join(f'{one:g}' for one in distinct)}, so they are predicted as "
                "numbers; pass --kind classification if they are names of classes."
            )
    else:
        words = [class_of(table, layout, number, value) for number, value in zip(numbers, values, strict=True)]
        check_types(table, layout, values, numbers)
        layout = replace(layout, kind=kind or "classification", label_names=ordered_classes(set(words)))
        notes += alike(layout.label_names)
        check_classes(table, layout, words, numbers, split=validation is None)
    notes += _said_of_lines(table, columns, numbers)
    rows = _dataset(table, layout, columns, values, numbers)
    if validation is not None:
        scored, more = _labelled_rows(validation, layout, like=table.place)
        return _Parts(layout, rows, scored, (*notes, *more))
    kept, chosen = _split(rows, layout.kind, seed)
    layout = replace(layout, held_out={"seed": seed, "rows": len(chosen), "of": len(rows)})
    return _Parts(layout, rows.select(kept), rows.select(chosen), tuple(notes))


def _labelled_rows(table: Table, layout: Layout, like: str = "") -> "tuple[Dataset, list[str]]":
    _check_size(table)
    if layout.label is None:
        raise InputError(f"{table.place} is read without labels, so it cannot be scored; name them with --label")
    columns, values, numbers, notes = _read(table, layout, like)
    return _dataset(table, layout, columns, values, numbers, like), notes


def _check_size(table: Table) -> None:
    path = Path(table.place)
    if path.is_file() and path.stat().st_size > LARGEST:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes, expected at most {LARGEST:,}; give a part of it")


def _read(table: Table, layout: Layout, like: str = "") -> tuple[list[list[Any]], list[Any], list[int], list[str]]:
    """The columns of text, the labels, the numbers of the rows, and sentences; rows without text are left out."""
    positions = [_position(table, column, like) for column in layout.text]
    at_label = _position(table, layout.label or "", like)
    columns: list[list[Any]] = [[] for _ in positions]
    values, numbers, blanks = [], [], Blanks(table)
    for number, row in table.read():
        found = [row[position] for position in positions]
        if blanks.takes(number, layout.text, found):
            continue
        for column, name, value in zip(columns, layout.text, found, strict=True):
            column.append(input_of(table, layout.kind, number, name, value))
        values.append(row[at_label])
        numbers.append(number)
    notes = blanks.said(len(numbers))
    if not numbers:
        raise InputError(f"{table.place} has no rows; expected at least one")
    return columns, values, numbers, notes


def _position(table: Table, column: str, like: str) -> int:
    try:
        return table.position(column)
    except InputError as error:
        if not like:
            raise
        raise InputError(f"{error}; {like} has it, so give the tables the same columns") from error


def _dataset(
    table: Table,
    layout: Layout,
    columns: Sequence[list[Any]],
    values: Sequence[Any],
    numbers: Sequence[int],
    like: str = "",
) -> "Dataset":
    from datasets import ClassLabel, Dataset, Features, Image, Value

    if layout.kind == "regression":
        label: Any = Value("float32")
        found: list[Any] = [
            (target_of(table, layout, number, value) - layout.center) / layout.scale
            for number, value in zip(numbers, values, strict=True)
        ]
    else:
        label = ClassLabel(names=list(layout.label_names))
        known = {name: number for number, name in enumerate(layout.label_names)}
        found = []
        for number, value in zip(numbers, values, strict=True):
            word = class_of(table, layout, number, value)
            if word not in known:
                raise InputError(
                    f"{table.at(number, layout.label)}: the label is {shortened(repr(word), 60)}, which "
                    f"{like or 'the model'} does not have; its labels are {shortened(', '.join(known))}"
                )
            found.append(known[word])
    names = inputs_of(layout)
    kind = Image() if layout.kind == "images" else Value("large_string")
    return Dataset.from_dict(
        {**dict(zip(names, columns, strict=True)), LABEL: found},
        features=Features({**dict.fromkeys(names, kind), LABEL: label}),
    )


def inputs_of(layout: Layout) -> tuple[str, ...]:
    """The columns of a task for the columns of the user's table."""
    if layout.kind == "images":
        return (IMAGE,)
    if layout.kind == "instructions":
        return (MESSAGES,) if len(layout.text) == 1 else (PROMPT, COMPLETION)
    return (TEXT, PAIRED)[: len(layout.text)]


def _split(rows: "Dataset", kind: str, seed: int) -> tuple[list[int], list[int]]:
    """Rows to train on and rows held out, in their order; each class has its share in both, at least one row."""
    if len(rows) < 2:
        raise InputError(f"there is {len(rows)} row; give two or more, so that one can be held out, or --validation")
    generator = np.random.default_rng(seed)
    share = min(HELD_OUT, MOST_HELD_OUT / len(rows))
    groups = [np.arange(len(rows))]
    if kind in ("classification", "images"):
        labels = np.asarray(rows.with_format("numpy")[LABEL][:])
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = np.sort(
        np.concatenate([generator.permutation(group)[: max(1, round(share * len(group)))] for group in groups])
    )
    return np.setdiff1d(np.arange(len(rows)), chosen).tolist(), chosen.tolist()


def _language_parts(
    table: Table, validation: Table | None, layout: Layout, seed: int, cut: Callable[[str], list[str]]
) -> _Parts:
    rows, notes = _documents(table, layout, cut)
    if validation is not None:
        scored, more = _documents(validation, layout, cut)
        return _Parts(layout, rows, scored, (*notes, *more))
    kept, chosen = _split(rows, layout.kind, seed)
    layout = replace(layout, held_out={"seed": seed, "rows": len(chosen), "of": len(rows)})
    return _Parts(layout, rows.select(kept), rows.select(chosen), tuple(notes))


def _documents(table: Table, layout: Layout, cut: Callable[[str], list[str]]) -> "tuple[Dataset, list[str]]":
    from datasets import Dataset

    _check_size(table)
    positions = [table.position(column) for column in layout.text]
    names = inputs_of(layout)
    found: dict[str, list[Any]] = {name: [] for name in names}
    blanks, rows = Blanks(table), 0
    for number, row in table.read():
        values = [row[position] for position in positions]
        if blanks.takes(number, layout.text, values):
            continue
        rows += 1
        values = [
            input_of(table, layout.kind, number, column, value)
            for column, value in zip(layout.text, values, strict=True)
        ]
        if layout.kind == "language":
            found[TEXT].extend(cut(values[0]))
            continue
        if len(names) == 1:
            _check_answered(table, number, layout.text[0], values[0])
        for column, name, value in zip(layout.text, names, values, strict=True):
            if found[name] and type(value) is not type(found[name][0]):
                raise InputError(
                    f"{table.at(number, column)}: found {type_of(value)}, where the rows before have "
                    f"{type_of(found[name][0])}; give all rows one form"
                )
            found[name].append(value)
    notes = blanks.said(rows)
    if not found[names[0]]:
        raise InputError(f"{table.place} has no rows with text; expected at least one")
    return Dataset.from_dict(found), notes


def _check_answered(table: Table, number: int, column: str, value: Any) -> None:
    if not isinstance(value, list) or value[-1]["role"] != "assistant":
        raise InputError(
            f"{table.at(number, column)}: found {shortened(repr(value), 60)}, expected a list of messages whose last "
            "one is the assistant's answer"
        )


def _task(
    name: str, layout: Layout, train: "Dataset", evaluation: "Dataset", split: str, causal: bool, identity: str,
    notes: tuple[str, ...],
) -> Task:  # fmt: skip
    kinds: dict[str, Any] = {
        "images": "classification", "language": "causal_language" if causal else "masked_language",
    }  # fmt: skip
    kind: Literal["classification", "regression", "masked_language", "causal_language", "instructions"]
    kind = kinds.get(layout.kind, layout.kind)
    metrics: tuple[str, ...] = LIKELIHOOD_METRICS
    if kind == "classification":
        metrics = ("accuracy", "macro_f1")
    elif kind == "regression":
        metrics = ("pearson", "spearman", "r2")
    if kind == "masked_language":
        evaluation = evaluation.add_column(MASK_SEED, list(range(len(evaluation))))
    return Task(
        name=name,
        modality="image" if layout.kind == "images" else "text",
        kind=kind,
        inputs=inputs_of(layout),
        label_names=layout.label_names,
        train=train,
        evaluation=evaluation,
        metrics=metrics,
        headline=metrics[0],
        evaluation_split=split,
        layout=layout,
        identity=identity,
        notes=notes,
    )


def _said_of_lines(table: Table, columns: Sequence[list[Any]], numbers: Sequence[int]) -> list[str]:
    """Which texts span lines: an odd quotation mark makes one text of several rows."""
    spans = [
        number
        for number, *texts in zip(numbers, *columns, strict=True)
        if any(isinstance(text, str) and "\n" in text for text in texts)
    ]
    if not spans or table.unit != "line":
        return []
    what = "text spans" if len(spans) == 1 else "texts span"
    return [
        f"{len(spans):,} {what} several lines, the first in {table.unit} {spans[0]}; if that is not meant, a quotation "
        "mark is missing there."
    ]


def _said(table: Table, layout: Layout, causal: bool) -> str:
    """How the columns are read, as one sentence."""
    columns = " and ".join(repr(column) for column in layout.text)
    if layout.kind == "regression":
        return f"{table.place} is read as a regression: the number {layout.label!r} from {columns}."
    if layout.kind in ("classification", "images"):
        names = layout.label_names
        shown = ", ".join(names[:FEW]) + (", …" if len(names) > FEW else "")
        what = "pictures" if layout.kind == "images" else columns
        return (
            f"{table.place} is read as a classification: {layout.label!r} from {what}, {len(names)} classes "
            f"({shortened(shown)})."
        )
    if layout.kind == "instructions":
        return f"{table.place} is read as instructions ({columns}); the answers alone are learned."
    way = "each next token" if causal else "hidden tokens"
    return f"{table.place} is read as running text ({columns}), of which {way} are predicted."


def _said_of_split(table: Table, validation: Table | None, layout: Layout, train: int, held_out: int) -> str:
    if validation is not None:
        return f"{train:,} examples are trained on, and {held_out:,} of {validation.place} are scored."
    shares = ", with each class in both parts," if layout.label_names and layout.kind != "regression" else ""
    return (
        f"{held_out:,} of {train + held_out:,} examples are held out at random (seed {layout.held_out['seed']})"
        f"{shares} and scored; give --validation to choose them."
    )


def _said_of_classes(layout: Layout, scored: "Dataset") -> list[str]:
    """How many of the scored rows have the commonest label, beside which an accuracy is to be read."""
    if layout.kind not in ("classification", "images"):
        return []
    ((label, count),) = Counter(scored[LABEL]).most_common(1)
    name = shortened(repr(layout.label_names[label]), 60)
    return [f"The commonest label, {name}, is that of {count / len(scored):.0%} of the scored rows."]


def token_cutter(tokenizer: "PreTrainedTokenizerBase", length: int) -> Callable[[str], list[str]]:
    """Cuts a text into pieces of at most `length` tokens, special ones among them; no part of the text is lost."""
    if not tokenizer.is_fast:
        return passages
    room = max(1, length - tokenizer.num_special_tokens_to_add())
    return partial(_pieces, tokenizer, room)


def _pieces(tokenizer: "PreTrainedTokenizerBase", room: int, text: str) -> list[str]:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [offsets[at][0] for at in range(0, len(offsets), room)]
    ends = [*starts[1:], len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True) if text[start:end].strip()]


def rows_of(table: Table, layout: Layout, blanks: Blanks) -> Iterator[tuple[int, list[Any], dict[str, Any] | None]]:
    """Number, values, and the model's inputs of each row of a table whose labels are not known; None without text."""
    layout = replace(layout, text=layout.text[:1]) if layout.kind == "instructions" else layout
    positions = [table.position(column) for column in layout.text]
    names = inputs_of(layout) if layout.kind != "instructions" else (PROMPT,)
    for number, row in table.read():
        values = [row[position] for position in positions]
        if blanks.takes(number, layout.text, values):
            yield number, row, None
            continue
        yield (
            number,
            row,
            {
                name: input_of(table, layout.kind, number, column, value)
                for name, column, value in zip(names, layout.text, values, strict=True)
            },
        )
