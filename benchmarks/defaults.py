"""The default of `tune` beside LoRA, on two tables of a user: `python -m benchmarks.defaults --data FOLDER`.

FOLDER has `amazonReviewSnippets_GroundTruth.txt` and `tweets_GroundTruth.txt` of VADER (Hutto & Gilbert, ICWSM 2014),
which come in the source package of vaderSentiment 3.3.2, in `additional_resources/hutto_ICWSM_2014.tar.gz`. Sentences
of reviews are told apart by the sign of their mean rating, ratings of tweets are predicted. Each method has its default
rates, three epochs and batches of 32; a tenth of the rows, the same for all methods, is scored. Writes
benchmarks/results/defaults.json.
"""

import csv
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import spectralbasis as sb
from benchmarks.results import environment, parse_arguments, write

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "LoRA, r = 1": {"method": "lora", "rank": 1},
    "diagonal, k = 64": {"coefficients": "diagonal", "leading": 64},
    "LoRA, r = 8": {"method": "lora", "rank": 8},
}
TABLES: dict[str, tuple[str, Callable[[float], Any]]] = {
    "reviews": ("amazonReviewSnippets_GroundTruth.txt", lambda value: "positive" if value > 0 else "negative"),
    "tweets": ("tweets_GroundTruth.txt", float),
}


def main() -> None:
    arguments = parse_arguments(__doc__, data="", seeds=1, model="minilm")
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in TABLES:
            for seed in range(arguments.seeds):
                train, test = split(Path(arguments.data), name, folder, seed)
                for method, options in METHODS.items():
                    rows.append({"table": name, "seed": seed, "method": method,
                                 **tuned(arguments.model, train, test, folder / "out", seed, options)})  # fmt: skip
                    print(rows[-1], flush=True)
    write("defaults", {"model": arguments.model, "rows": rows, **environment()})


def split(data: Path, name: str, folder: Path, seed: int) -> tuple[Path, Path]:
    """A table's rows to train on, and a tenth of them to score on, as CSV files."""
    file, label = TABLES[name]
    lines = [line.split("\t", 2) for line in (data / file).read_text(encoding="latin-1").splitlines()]
    rows = [(text, label(float(value))) for _, value, text in lines if float(value) != 0]
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = (order[len(rows) // 10 :], order[: len(rows) // 10])
    places = tuple(folder / f"{name}-{part}.csv" for part in ("train", "test"))
    for place, chosen in zip(places, parts, strict=True):
        with place.open("w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([("text", "label"), *(rows[index] for index in chosen)])
    return places[0], places[1]


def tuned(model: str, train: Path, test: Path, output: Path, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The score and the costs of one method."""
    found = sb.tune(model, train=train, validation=test, output=output, seed=seed, bf16=True, progress=False,
                    overwrite=True, **options)  # fmt: skip
    return {
        "metric": found.metric, "score": found.score, "numbers": found.parameters.backbone,
        "bytes": found.adapter_bytes, "seconds_per_step": found.seconds_per_step, "steps": found.steps,
    }  # fmt: skip


if __name__ == "__main__":
    main()
