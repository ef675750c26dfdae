"""Tasks on text: GLUE from its original TSV files or the hub, and masked language modelling on running text."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened
from spectralbasis.training.data_files import LARGEST, TaskRecord, find_data_file, first_line, read_text, tar_members
from spectralbasis.training.tasks import LABEL, LIKELIHOOD_METRICS, MASK_SEED, TEXT, Task

if TYPE_CHECKING:
    from datasets import Dataset, Features

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """A GLUE task: its inputs, named as on the hub, and the columns of its original files.

    `columns` and `label_column` are names in the header, or positions where the file has no header. The file gives a
    label by its name or by its number; `label_names` are in the order of the numbers on the hub. `labelled_test_file`
    is a test file with labels and the same columns, which some copies of the original files have.
    """

    name: str
    description: str
    inputs: tuple[str, ...]
    columns: tuple[str, ...] | tuple[int, ...]
    label_column: str | int
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    kind: Literal["classification", "regression"] = "classification"
    evaluation_file: str = "dev.tsv"
    labelled_test_file: str = ""
    hub_split: str = "validation"

    @property
    def features(self) -> "Features":
        from datasets import ClassLabel, Features, Value

        label = Value("float32") if self.kind == "regression" else ClassLabel(names=list(self.label_names))
        return Features({**{column: Value("string") for column in self.inputs}, LABEL: label})

    def parse_label(self, text: str) -> float | int:
        """The number that stands for the label `text` of the original file; raises ValueError for any other text."""
        if self.kind == "regression":
            if not math.isfinite(float(text)):
                raise ValueError(text)
            return float(text)
        if text in self.label_names:
            return self.label_names.index(text)
        number = int(text)
        if number not in range(len(self.label_names)):
            raise ValueError(text)
        return number


PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
CORRELATIONS = ("pearson_spearman", "pearson", "spearman")

GLUE_TASKS = (
    GlueTask("RTE", "does one text follow from another", PAIR, PAIR, "label", ENTAILMENT),
    GlueTask(
        "MRPC", "do two sentences say the same", PAIR, ("#1 String", "#2 String"), "Quality",
        ("not_equivalent", "equivalent"), ("accuracy", "f1"), labelled_test_file="msr_paraphrase_test.txt",
    ),
    GlueTask(
        "CoLA", "is a sentence well formed", ("sentence",), (3,), 1, ("unacceptable", "acceptable"),
        ("matthews", "accuracy"), "matthews",
    ),
    GlueTask(
        "STS-B", "how alike are two sentences, from 0 to 5", PAIR, PAIR, "score", ("similarity",), CORRELATIONS,
        "pearson_spearman", kind="regression",
    ),
    GlueTask(
        "SST-2", "is an opinion of a film good or bad", ("sentence",), ("sentence",), "label", ("negative", "positive"),
        labelled_test_file="test-labeled.tsv",
    ),
    GlueTask(
        "QNLI", "does a sentence answer a question", ("question", "sentence"), ("question", "sentence"), "label",
        ENTAILMENT,
    ),
    GlueTask(
        "QQP", "do two questions ask the same", ("question1", "question2"), ("question1", "question2"), "is_duplicate",
        ("not_duplicate", "duplicate"), ("accuracy", "f1"),
    ),
    GlueTask(
        "MNLI", "does one sentence follow from another, contradict it or neither", ("premise", "hypothesis"), PAIR,
        "gold_label", ("entailment", "neutral", "contradiction"), evaluation_file="dev_matched.tsv",
        hub_split="validation_matched",
    ),
    GlueTask(
        "WNLI", "is a pronoun read rightly", PAIR, PAIR, "label", ("not_entailment", "entailment")
    ),
)  # fmt: skip


def load_glue(glue: GlueTask, data: Path | None, *, test: bool = False) -> Task:
    """Load a GLUE task from its folder of TSV files, or from the hub where `data` is None.

    Args:
        glue: the task.
        data: its folder, or the parent.
        test: score on the test file with labels where the folder has one, else on the development set as usual.

    Raises:
        InputError: a file or column is missing, a row cannot be read, or the hub cannot be reached.
    """
    file = glue.evaluation_file
    if data is None:
        train, evaluation = _from_hub(glue)
    else:
        folder = _folder(glue, data)
        if test and glue.labelled_test_file and (folder / glue.labelled_test_file).is_file():
            file = glue.labelled_test_file
        train, evaluation = _read_split(glue, folder / "train.tsv"), _read_split(glue, folder / file)
    return Task(
        name=glue.name,
        modality="text",
        kind=glue.kind,
        inputs=glue.inputs,
        label_names=glue.label_names,
        train=train,
        evaluation=evaluation,
        metrics=glue.metrics,
        headline=glue.headline,
        evaluation_split=glue.hub_split if data is None else Path(file).stem,
    )


def _from_hub(glue: GlueTask) -> "tuple[Dataset, Dataset]":
    import datasets

    try:
        splits = datasets.load_dataset(HUB_DATASET, glue.name.lower().replace("-", ""))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{glue.name} cannot be loaded from {HUB_DATASET} on the Hugging Face hub ({first_line(error)}); "
            f"go online, or pass --data with a folder that holds {glue.name}/train.tsv"
        ) from error
    columns = [*glue.inputs, LABEL]
    return splits["train"].select_columns(columns), splits[glue.hub_split].select_columns(columns)


def _folder(glue: GlueTask, data: Path) -> Path:
    """The first of DATA/RTE, DATA/glue/RTE and DATA itself that holds train.tsv, in any case of the names."""

    def children(folder: Path, name: str) -> list[Path]:
        if not folder.is_dir():
            return []
        return sorted(child for child in folder.iterdir() if child.name.lower() == name.lower())

    nested = [folder for parent in children(data, "glue") for folder in children(parent, glue.name)]
    for folder in (*children(data, glue.name), *nested, data):
        if (folder / "train.tsv").is_file():
            return folder
    raise InputError(
        f"no {glue.name} in {data}: looked for train.tsv in {data / glue.name}, {data / 'glue' / glue.name} "
        f"and {data}; pass --data with a folder that holds {glue.name}/train.tsv"
    )


def _read_split(glue: GlueTask, file: Path) -> "Dataset":
    from datasets import Dataset

    if not file.is_file():
        raise InputError(f"{glue.name} lacks {file.name}: looked for {file}; copy the original GLUE file there")
    columns: dict[str, list[Any]] = {name: [] for name in (*glue.inputs, LABEL)}
    for line, *texts, label in _rows(glue, file):
        for name, text in zip(glue.inputs, texts, strict=True):
            columns[name].append(text)
        try:
            columns[LABEL].append(glue.parse_label(label))
        except ValueError as error:
            expected = "a number" if glue.kind == "regression" else " or ".join(glue.label_names)
            raise InputError(
                f"{file}, line {line}: the label is {shortened(repr(label))} where {expected} was expected"
            ) from error
    if not columns[LABEL]:
        raise InputError(f"{file} holds no examples; copy the original GLUE file there")
    return Dataset.from_dict(columns, features=glue.features)


def _rows(glue: GlueTask, file: Path) -> Iterator[tuple[Any, ...]]:
    """The line number, the inputs and the label of each row; quotes are text, as the original files mean them."""
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file} has {file.stat().st_size:,} bytes, expected at most {LARGEST:,} of a data set")
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
            wanted = _positions(glue, file, reader)
            for row in reader:
                if len(row) <= max(wanted):
                    raise InputError(
                        f"{file}, line {reader.line_num}: {len(row)} columns where {max(wanted) + 1} or more "
                        "were expected; separate the columns by tabs"
                    )
                yield reader.line_num, *(row[position] for position in wanted)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} cannot be read as tab-separated UTF-8 text: {error}") from error


def _positions(glue: GlueTask, file: Path, reader: Iterator[list[str]]) -> list[int]:
    """Positions of the inputs and of the label, from the header where the file has one."""
    names = (*glue.columns, glue.label_column)
    if all(isinstance(name, int) for name in names):
        return [int(name) for name in names]
    header = next(reader, [])
    twice = [name for name in names if header.count(str(name)) > 1]
    if twice:
        raise InputError(f"{file} has the column {twice[0]!r} twice, expected it once")
    missing = [name for name in names if name not in header]
    if missing:
        raise InputError(
            f"{file} has no column {missing[0]!r}; its columns are {shortened(', '.join(header) or 'none')}, "
            f"and {glue.name} needs {', '.join(str(name) for name in names)}"
        )
    return [header.index(str(name)) for name in names]


WORDS = 40
"""Words in a passage: about 60 tokens of a vocabulary of some thousand."""
EVALUATION_PASSAGES = 1024
"""At most so many passages, evenly spaced over the held-out text, are scored."""
HELD_OUT = 10
"""One in ten is held out: of the novels every tenth book, of a single text its last tenth."""

NOVELS = "english_novels_97.tar.xz"
TEXT_FOLDER = "wikitext2_shakespeare"
MASKED = "masked words"


def passages(text: str) -> list[str]:
    """The text cut into passages of `WORDS` words, in order; a shorter rest is left out unless it is all there is."""
    words = text.split()
    starts = range(0, max(len(words) - WORDS, 0) + 1, WORDS)
    return [" ".join(words[start : start + WORDS]) for start in starts if words]


def masked_language_task(name: str, train: Sequence[str], held_out: Sequence[str], split: str) -> Task:
    """A task of filling in masked tokens of passages; those of the evaluation are masked alike every time.

    Raises:
        InputError: one of the two parts has no passage.
    """
    from datasets import Dataset

    if not train or not held_out:
        raise InputError(f"{name} has {len(train)} passages to train on and {len(held_out)} held out; give more text")
    rows = np.linspace(0, len(held_out) - 1, min(EVALUATION_PASSAGES, len(held_out))).astype(int)
    chosen = [held_out[row] for row in rows]
    return Task(
        name=name,
        modality="text",
        kind="masked_language",
        inputs=(TEXT,),
        label_names=(),
        train=Dataset.from_dict({TEXT: list(train)}),
        evaluation=Dataset.from_dict({TEXT: chosen, MASK_SEED: list(range(len(chosen)))}),
        metrics=LIKELIHOOD_METRICS,
        headline=LIKELIHOOD_METRICS[0],
        evaluation_split=split,
    )


def load_novels(data: Path | None) -> Task:
    """Passages of the novels in `english_novels_97.tar.xz`, of which every tenth, by name, is held out.

    Raises:
        InputError: the archive is absent, damaged or holds fewer than two texts.
    """
    file = find_data_file("novels", "english_novels", NOVELS, data)
    books = []
    for name, content in tar_members(file):
        if name.endswith(".txt"):
            try:
                books.append((name, content.decode("utf-8-sig")))
            except UnicodeDecodeError as error:
                raise InputError(f"{name} in {file} cannot be read as UTF-8 text: {first_line(error)}") from error
    held_out = range(HELD_OUT - 1, len(books), HELD_OUT) or range(len(books) - 1, len(books))
    parts: dict[bool, list[str]] = {False: [], True: []}
    for number, (_, text) in enumerate(sorted(books)):
        parts[number in held_out] += passages(text)
    return masked_language_task("novels", parts[False], parts[True], "held-out books")


def load_shakespeare(data: Path | None) -> Task:
    """Passages of Shakespeare's plays; the last tenth is held out.

    Raises:
        InputError: the file is absent or not text.
    """
    text = read_text(find_data_file("Shakespeare", TEXT_FOLDER, "tinyshakespeare.txt", data))
    return masked_language_task("Shakespeare", *_last_tenth(passages(text)), "last tenth")


def load_wikitext(data: Path | None) -> Task:
    """Passages of WikiText-2: its validation part to train on, its test part held out.

    Raises:
        InputError: a file is absent or not text.
    """
    names = ("wikitext2_valid.txt", "wikitext2_test.txt")
    train, test = (passages(read_text(find_data_file("WikiText-2", TEXT_FOLDER, name, data))) for name in names)
    return masked_language_task("WikiText-2", train, test, "test")


def load_descriptions(data: Path | None) -> Task:
    """Passages of scikit-learn's descriptions of its data sets, some 6,000 words; the last tenth is held out.

    Raises:
        InputError: a data folder was given, which this task cannot use.
    """
    if data is not None:
        raise InputError(
            f"the task descriptions is bundled with scikit-learn and reads no data; leave out --data {data}"
        )
    folder = files("sklearn.datasets") / "descr"
    pages = sorted((page for page in folder.iterdir() if page.name.endswith(".rst")), key=lambda page: page.name)
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    return masked_language_task("descriptions", *_last_tenth(passages(text)), "last tenth")


def _last_tenth(cut: list[str]) -> tuple[list[str], list[str]]:
    held_out = max(1, len(cut) // HELD_OUT)
    return cut[:-held_out], cut[-held_out:]


TEXT_TASKS = (
    *(
        TaskRecord(glue.name, "GLUE", glue.description, partial(load_glue, glue), "glue", HUB_DATASET)
        for glue in GLUE_TASKS
    ),
    TaskRecord("novels", MASKED, "97 English novels", load_novels, "english_novels"),
    TaskRecord("Shakespeare", MASKED, "plays", load_shakespeare, TEXT_FOLDER),
    TaskRecord("WikiText-2", MASKED, "articles of an encyclopaedia", load_wikitext, TEXT_FOLDER),
    TaskRecord("descriptions", MASKED, "scikit-learn's descriptions of data sets", load_descriptions),
)
