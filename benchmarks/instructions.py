"""Do the answers of a small Llama change as they are trained? `python -m benchmarks.instructions --data FOLDER`.

Takes Karpathy's stories260K (`stories260K.bin` and `tok512.bin` in FOLDER), a Llama of 260,032 parameters that writes
children's stories, and questions about one sentence, whose answer is a name or a colour of that sentence. Sentences
that are scored occur in no training row. Writes benchmarks/results/instructions.json: the share of exact answers and
the mean log-likelihood of the answers' tokens before and after the training, with several methods.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import spectralbasis as sb
from benchmarks.results import environment, parse_arguments, write
from spectralbasis.study.stories import read_stories

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
COLOURS = ("red", "blue", "green", "big", "small", "yellow", "pink", "old")
THINGS = ("ball", "car", "hat", "box", "book", "dog", "cat", "doll", "cup", "bird")
METHODS: dict[str, dict[str, Any]] = {
    "spectral, diagonal": {"coefficients": "diagonal", "leading": 64},
    "spectral, core": {"coefficients": "core", "leading": 32},
    "lora": {"method": "lora", "rank": 4},
    "full": {"method": "full"},
}


def main() -> None:
    arguments = parse_arguments(__doc__, data="", steps=300)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = save_model(Path(arguments.data), folder / "model")
        train, test = save_questions(folder)
        rows = [{"method": "none", "parameters": 0, **scored(base, None, test)}]
        for name, options in METHODS.items():
            rows.append({"method": name, **trained(base, train, test, folder / name, arguments.steps, options)})
        settings = {"steps": arguments.steps, "train": len(read(train)), "test": len(read(test))}
    write("instructions", {"settings": settings, "rows": rows, **environment()})


def trained(base: Path, train: Path, test: Path, output: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """A model tuned to the questions, and its scores on those held out."""
    tuned = sb.tune(base, train=train, validation=test, output=output, steps=steps, progress=False, **options)
    who = (output, None) if options.get("method") == "full" else (base, output)
    return {
        "parameters": tuned.parameters.backbone,
        "seconds": tuned.seconds,
        "bytes": tuned.adapter_bytes,
        **scored(*who, test),
    }


def scored(model: Path, adapter: Path | None, test: Path) -> dict[str, Any]:
    """Scores of a model on questions, and its first answers."""
    metrics = sb.evaluate(model, adapter, test=test, kind="instructions", progress=False).metrics
    rows = read(test)
    said = [row["prediction"] for row in sb.predict(model, adapter, test, new_tokens=8)]
    right = sum(answer == row["completion"] for answer, row in zip(said, rows, strict=True))
    first = [[row["prompt"], row["completion"], answer] for row, answer in zip(rows[:4], said[:4], strict=True)]
    return {"exact": right / len(rows), **metrics, "answers": first}


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def save_questions(folder: Path, train: int = 480, test: int = 80) -> tuple[Path, Path]:
    """Files of two questions about each sentence; no sentence is in both."""
    sentences = list(product(NAMES, COLOURS, THINGS))
    Random(0).shuffle(sentences)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, chosen in zip(files, (sentences[:train], sentences[train : train + test]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for sentence in chosen for row in questions(sentence)))
    return files


def questions(sentence: Sequence[str]) -> Iterator[dict[str, str]]:
    """Who has the thing, and what it is like."""
    name, colour, thing = sentence
    said = f"{name} has a {colour} {thing}."
    yield {"prompt": f"{said} Who has the {thing}?", "completion": name}
    yield {"prompt": f"{said} What is the {thing} like?", "completion": colour}


def save_model(data: Path, folder: Path) -> Path:
    """stories260K as a folder of transformers."""
    for part in read_stories(data):
        part.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
