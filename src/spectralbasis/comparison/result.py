"""What a comparison gives back: a tidy table, a summary and a page."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from spectralbasis.files import atomic_path
from spectralbasis.folders import claim_files


@dataclass(frozen=True)
class Comparison:
    """Results of `compare`.

    Attributes:
        table: one row per measurement; the columns are the fields of `comparison.rows.Row`.
        sharing: the same between every two finetuned checkpoints (`comparison.rows.SharedRow`); None where there is
            only one.
    """

    table: pd.DataFrame
    _summary: dict[str, Any]
    sharing: pd.DataFrame | None = None

    def summary(self) -> dict[str, Any]:
        """Verdicts with their intervals, settings, versions: the content of `summary.json`."""
        return self._summary

    def save(self, directory: str | Path) -> None:
        """Write `comparison.parquet`, `summary.json` and, of several checkpoints, `sharing.parquet` into a folder."""
        folder = Path(directory)
        claim_files(folder, "comparison.parquet", "summary.json", "sharing.parquet")
        # All are written before the first takes its place: a full disk leaves the files of an earlier run together.
        with ExitStack() as files:
            if self.sharing is not None:
                _write(self.sharing, files.enter_context(atomic_path(folder / "sharing.parquet")))
            _write(self.table, files.enter_context(atomic_path(folder / "comparison.parquet")))
            summary = files.enter_context(atomic_path(folder / "summary.json"))
            summary.write_text(json.dumps(self._summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if self.sharing is None:
            (folder / "sharing.parquet").unlink(missing_ok=True)

    def report(self, directory: str | Path) -> Path:
        """Write the results and the page made from them into a folder; returns the path of `index.html`."""
        # Reports read results and never the other way round: this is the one place that calls forward.
        from spectralbasis.report import write_report

        self.save(directory)
        return write_report(Path(directory))


def _write(table: pd.DataFrame, file: Path) -> None:
    table.to_parquet(file, index=False, write_page_checksum=True)
