"""What the types of GGUF do to the spectrum of a model's matrices: `python -m benchmarks.quantization`.

Writes the model of the extra `minilm` as GGUF in each type that the package `gguf` quantizes to, and compares each file
with the model. Writes benchmarks/results/quantization.json, from which `python -m benchmarks.tables` makes the table in
docs/quantization.md.
"""

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import AutoModel

import spectralbasis as sb
from benchmarks.gguf_files import write
from benchmarks.results import environment, parse_arguments
from benchmarks.results import write as write_results
from spectralbasis.locations import MINILM, installed_folder

KINDS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Without F16, in which the numbers of this model are stored already."""


def main() -> None:
    arguments = parse_arguments(__doc__, leading=64, draws=5)
    model = AutoModel.from_pretrained(installed_folder(MINILM))
    with tempfile.TemporaryDirectory() as folder:
        files = {kind: Path(folder) / f"minilm-{kind}.gguf" for kind in KINDS}
        for kind, file in files.items():
            write(model, file, kind)
        rows = [
            {"kind": kind, "bytes": file.stat().st_size} | measured(file, arguments.leading, arguments.draws)
            for kind, file in files.items()
        ]
    settings = {"leading": arguments.leading, "draws": arguments.draws}
    write_results("quantization", {"settings": settings, "rows": rows, **environment()})


def measured(file: Path, leading: int, draws: int) -> dict[str, Any]:
    """The change of one file against the model: medians over matrices, and the largest shift of a singular value."""
    result = sb.compare(MINILM, [file], leading=leading, draws=draws)
    table, summary = result.table, result.summary()

    def values(metric: str) -> pd.Series:
        return table[(table.metric == metric) & (table.k == leading)].value

    found = table[(table.metric == "coverage_core") & (table.k == leading)]
    return {
        "matrices": summary["matrices"],
        "update": float(table[table.metric == "update_norm_relative"].value.median()),
        "overlap": float(values("subspace_overlap").median()),
        "lowest_overlap": float(values("subspace_overlap").min()),
        "shift": float(values("singular_value_shift").abs().max()),
        "coverage": float(found.value.median()),
        "null_coverage": float(found.null_mean.median()),
        "coverage_verdict": summary["coverage"]["verdict"],
    }


if __name__ == "__main__":
    main()
