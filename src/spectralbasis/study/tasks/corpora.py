"""Masked language modelling on running text: novels, Shakespeare, WikiText-2, and texts that scikit-learn brings."""

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from datasets import Dataset

from spectralbasis.errors import InputError
from spectralbasis.study.messages import first_line
from spectralbasis.study.tasks.data_files import read_text, tar_members
from spectralbasis.study.tasks.data_folders import find_data_file
from spectralbasis.study.tasks.likelihood import METRICS
from spectralbasis.study.tasks.masking import MASK_SEED, TEXT
from spectralbasis.study.tasks.task import Task, register_task

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
        metrics=METRICS,
        headline=METRICS[0],
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
