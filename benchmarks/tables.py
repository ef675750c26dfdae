"""Writes the tables of the documentation from the results of the benchmarks: `python -m benchmarks.tables`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, read

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    for name, make in TABLES.items():
        if (FOLDER / f"{name}.json").exists():
            page = DOCS / f"{name}.md"
            before, _, rest = page.read_text().partition(START)
            page.write_text(f"{before}{START}\n\n{make(read(name))}\n{END}{rest.partition(END)[2]}")


def calibration(found: dict[str, Any]) -> str:
    """Rates of verdicts, a row for each step and planted strength."""
    settings = found["settings"]
    rows = [
        [
            f"{row['step']:.0%}",
            f"{row['strength']:.0%}",
            *(
                f"{row[f'{claim}_{verdict}']:.0%}"
                for claim in ("stability", "coverage")
                for verdict in ("supported", "contradicted")
            ),
        ]
        for row in found["rows"]
    ]
    heads = ["step", "planted", "stability supported", "contradicted", "coverage supported", "contradicted"]
    m, n = settings["shape"]
    note = (
        f"{settings['trials']} simulated comparisons for each row, {settings['matrices']} matrices of {m}×{n} in "
        f"{settings['layers']} layers, k = {settings['k']}, 5 draws. {_machine(found)}"
    )
    return f"{_markdown(heads, rows)}\n\n{note}\n"


def _machine(found: dict[str, Any]) -> str:
    return f"spectralbasis {found['versions']['spectralbasis']}, torch {found['versions']['torch']}."


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


START, END = "<!-- table: made by python -m benchmarks.tables -->", "<!-- end of table -->"
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"calibration": calibration}


if __name__ == "__main__":
    main()
