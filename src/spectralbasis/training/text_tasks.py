"""How well a model fills in masked tokens.

Masked language modelling on running text: novels, Shakespeare, WikiText-2, and texts that scikit-learn brings.

GLUE's tasks, from folders of its original TSV files or from the Hugging Face hub.
"""

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch import nn
from torch.nn import functional

from spectralbasis.errors import InputError
from spectralbasis.printable import shortened, track
from spectralbasis.training.collators import IGNORED, MASK_SEED, TEXT, MaskingCollator
from spectralbasis.training.data_files import LARGEST, find_data_file, read_text, tar_members
from spectralbasis.training.messages import first_line
from spectralbasis.training.tasks import LABEL, Task, batches, register_task

LIKELIHOOD_METRICS = ("log_likelihood", "perplexity", "accuracy")
BATCH_SIZE = 64


@torch.inference_mode()
def masked_token_scores(
    model: nn.Module, examples: Dataset, collator: MaskingCollator, *, progress: bool = False
) -> dict[str, float]:
    """How the model predicts the hidden tokens of all examples.

    `log_likelihood` is the mean over hidden tokens of log p(token), in nats: at most 0, and larger is better.
    `perplexity` is exp(-log_likelihood), and `accuracy` the share of tokens that the model holds the likeliest.
    """
    model.eval()
    device = next(model.parameters()).device
    total, hits, tokens = 0.0, 0, 0
    count = math.ceil(len(examples) / BATCH_SIZE)
    for rows in track(batches(examples, BATCH_SIZE), "evaluating", total=count, enabled=progress):
        batch = {name: tensor.to(device) for name, tensor in collator(rows).items()}
        labels = batch.pop("labels")
        hidden = labels != IGNORED
        logits, wanted = model(**batch).logits[hidden].float(), labels[hidden]
        total -= float(functional.cross_entropy(logits, wanted, reduction="sum"))
        hits += int((logits.argmax(1) == wanted).sum())
        tokens += len(wanted)
    mean = total / tokens
    return dict(zip(LIKELIHOOD_METRICS, (mean, math.exp(-mean), hits / tokens), strict=True))


WORDS = 40
"""Words in a passage: about 60 tokens of a vocabulary of some thousand."""
EVALUATION_PASSAGES = 1024
"""At most so many passages, evenly spaced over the held-out text, are scored."""
HELD_OUT = 10
"""One in ten is held out: of the novels every tenth book, of a single text its last tenth."""

NOVELS = "english_novels_97.tar.xz"
TEXT_FOLDER = "wikitext2_shakespeare"


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
    books = sorted(_texts_of(file))
    held_out = range(HELD_OUT - 1, len(books), HELD_OUT) or range(len(books) - 1, len(books))
    parts: dict[bool, list[str]] = {False: [], True: []}
    for number, (_, text) in enumerate(books):
        parts[number in held_out] += passages(text)
    return masked_language_task("novels", parts[False], parts[True], "held-out books")


def load_shakespeare(data: Path | None) -> Task:
    """Passages of Shakespeare's plays; the last tenth is held out.

    Raises:
        InputError: the file is absent or no text.
    """
    cut = passages(read_text(find_data_file("Shakespeare", TEXT_FOLDER, "tinyshakespeare.txt", data)))
    return masked_language_task("Shakespeare", *_last_tenth(cut), "last tenth")


def load_wikitext(data: Path | None) -> Task:
    """Passages of WikiText-2: its validation part to train on, its test part held out.

    Raises:
        InputError: a file is absent or no text.
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
    cut = passages(" ".join(page.read_text(encoding="utf-8") for page in pages))
    return masked_language_task("descriptions", *_last_tenth(cut), "last tenth")


def _last_tenth(cut: list[str]) -> tuple[list[str], list[str]]:
    held_out = max(1, len(cut) // HELD_OUT)
    return cut[:-held_out], cut[-held_out:]


def _texts_of(archive: Path) -> Iterator[tuple[str, str]]:
    """The name and the text of each `.txt` of an archive."""
    for name, content in tar_members(archive):
        if name.endswith(".txt"):
            try:
                yield name, content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise InputError(f"{name} in {archive} cannot be read as UTF-8 text: {first_line(error)}") from error


CORPORA: dict[str, Callable[[Path | None], Task]] = {
    "novels": load_novels,
    "Shakespeare": load_shakespeare,
    "WikiText-2": load_wikitext,
    "descriptions": load_descriptions,
}

for _name, _load in CORPORA.items():
    register_task(_name, _load)


HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """How one GLUE task is laid out: its inputs, named as on the hub, and where its original files keep them.

    `columns` and `label_column` are names in the header, or positions where the file has none. A label stands in the
    file by its name or by its number; `label_names` are in the order of the numbers on the hub.
    """

    name: str
    inputs: tuple[str, ...]
    columns: tuple[str, ...] | tuple[int, ...]
    label_column: str | int
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    kind: Literal["classification", "regression"] = "classification"
    evaluation_file: str = "dev.tsv"
    hub_split: str = "validation"

    @property
    def hub_config(self) -> str:
        return self.name.lower().replace("-", "")

    @property
    def features(self) -> Features:
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
PARAPHRASE = ("not_equivalent", "equivalent")
STRINGS = ("#1 String", "#2 String")
QUESTIONS = ("question1", "question2")
INFERENCE = ("entailment", "neutral", "contradiction")
CORRELATIONS = ("pearson_spearman", "pearson", "spearman")

GLUE_TASKS = (
    GlueTask("RTE", PAIR, PAIR, "label", ENTAILMENT),
    GlueTask("MRPC", PAIR, STRINGS, "Quality", PARAPHRASE, metrics=("accuracy", "f1")),
    GlueTask("CoLA", ("sentence",), (3,), 1, ("unacceptable", "acceptable"), ("matthews", "accuracy"), "matthews"),
    GlueTask("STS-B", PAIR, PAIR, "score", ("similarity",), CORRELATIONS, "pearson_spearman", kind="regression"),
    GlueTask("SST-2", ("sentence",), ("sentence",), "label", ("negative", "positive")),
    GlueTask("QNLI", ("question", "sentence"), ("question", "sentence"), "label", ENTAILMENT),
    GlueTask("QQP", QUESTIONS, QUESTIONS, "is_duplicate", ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
    GlueTask(
        "MNLI",
        ("premise", "hypothesis"),
        PAIR,
        "gold_label",
        INFERENCE,
        evaluation_file="dev_matched.tsv",
        hub_split="validation_matched",
    ),
    GlueTask("WNLI", PAIR, PAIR, "label", ("not_entailment", "entailment")),
)


def load_glue(glue: GlueTask, data: Path | None) -> Task:
    """Load a GLUE task from its folder of TSV files, or from the hub where `data` is None.

    Raises:
        InputError: a file or column is missing, a row cannot be read, or the hub cannot be reached.
    """
    train, evaluation = _from_hub(glue) if data is None else _from_folder(glue, data)
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
        evaluation_split=glue.hub_split if data is None else Path(glue.evaluation_file).stem,
    )


def _from_hub(glue: GlueTask) -> tuple[Dataset, Dataset]:
    try:
        splits = datasets.load_dataset(HUB_DATASET, glue.hub_config)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{glue.name} cannot be loaded from {HUB_DATASET} on the Hugging Face hub ({first_line(error)}); "
            f"go online, or pass --data with a folder that holds {glue.name}/train.tsv"
        ) from error
    columns = [*glue.inputs, LABEL]
    return splits["train"].select_columns(columns), splits[glue.hub_split].select_columns(columns)


def _from_folder(glue: GlueTask, data: Path) -> tuple[Dataset, Dataset]:
    folder = _find_folder(glue, data)
    return _read_split(glue, folder / "train.tsv"), _read_split(glue, folder / glue.evaluation_file)


def _find_folder(glue: GlueTask, data: Path) -> Path:
    """The first of DATA/RTE, DATA/glue/RTE and DATA itself that holds train.tsv, whatever the case of the names."""
    nested = [folder for parent in _children(data, "glue") for folder in _children(parent, glue.name)]
    for place in (*_children(data, glue.name), *nested, data):
        if (place / "train.tsv").is_file():
            return place
    raise InputError(
        f"no {glue.name} in {data}: looked for train.tsv in {data / glue.name}, {data / 'glue' / glue.name} "
        f"and {data}; pass --data with a folder that holds {glue.name}/train.tsv"
    )


def _children(folder: Path, name: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(child for child in folder.iterdir() if child.name.lower() == name.lower())


def _read_split(glue: GlueTask, file: Path) -> Dataset:
    if not file.is_file():
        raise InputError(f"{glue.name} lacks {file.name}: looked for {file}; copy the original GLUE file there")
    columns: dict[str, list[Any]] = {name: [] for name in (*glue.inputs, LABEL)}
    for line, *texts, label in _rows(glue, file):
        for name, text in zip(glue.inputs, texts, strict=True):
            columns[name].append(text)
        columns[LABEL].append(_label(glue, file, line, label))
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


def _label(glue: GlueTask, file: Path, line: int, text: str) -> float | int:
    try:
        return glue.parse_label(text)
    except ValueError as error:
        expected = "a number" if glue.kind == "regression" else " or ".join(glue.label_names)
        raise InputError(
            f"{file}, line {line}: the label is {shortened(repr(text))} where {expected} was expected"
        ) from error


for _glue in GLUE_TASKS:
    register_task(_glue.name, partial(load_glue, _glue))
