"""Write a study as files: `results.json`, `figures.json`, and a Markdown page for each experiment."""

import html
import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.files import atomic_path
from spectralbasis.printable import in_code, in_markdown, printable
from spectralbasis.report.study_page import FIGURES, RESULTS, cell, devices_used, read_figures, read_study
from spectralbasis.study.claims import Claim, Findings
from spectralbasis.training.outcomes import write_json
from spectralbasis.version import library_versions


@dataclass(frozen=True)
class Part:
    """One experiment of a study: how much of it is done, and what that shows.

    `failed` is run → reason, `devices` is the name of a device → how many of the finished runs it did.
    """

    name: str
    question: str
    planned: int
    finished: int
    failed: Mapping[str, str]
    seconds: float
    devices: Mapping[str, int]
    findings: Findings

    def to_dict(self) -> dict[str, Any]:
        """Everything but the figures, as JSON can hold it."""
        return {
            "question": self.question,
            "planned": self.planned,
            "finished": self.finished,
            "failed": dict(self.failed),
            "seconds": round(self.seconds, 1),
            "devices": dict(self.devices),
            "claims": [claim.to_dict() for claim in self.findings.claims],
            "tables": {title: _split(table) for title, table in self.findings.tables.items()},
            "note": self.findings.note,
        }


def write_pages(folder: Path, preset: str, parts: Sequence[Part]) -> dict[str, Any]:
    """Write all files that show what a study found; returns the content of `results.json`.

    Experiments that the folder has results of and that are not among `parts` stay as they are.

    Raises:
        InputError: what the folder holds of an earlier study is damaged.
    """
    earlier = read_study(folder) if (folder / RESULTS).exists() else None
    others = earlier["experiments"] if earlier is not None and earlier["preset"] == preset else {}
    figures = {part.name: {t: _drawn(f) for t, f in part.findings.figures.items()} for part in parts}
    content = {
        "preset": preset,
        "command": f"spectralbasis study all --preset {preset} --data DIR -o {folder.name}",
        "commit": commit(),
        "versions": library_versions(),
        "experiments": others | {part.name: part.to_dict() for part in parts},
    }
    write_json(folder / FIGURES, read_figures(folder) | figures)
    for part in parts:
        with atomic_path(folder / f"{part.name}.md") as temporary:
            temporary.write_text(page(part, content), encoding="utf-8")
    write_json(folder / RESULTS, content)
    return content


def page(part: Part, content: Mapping[str, Any]) -> str:
    """The Markdown page of one experiment."""
    findings = part.findings
    command = content["command"].replace("study all", f"study {part.name}")
    failures = {"run": list(part.failed), "reason": list(part.failed.values())}
    lines = [
        f"# {part.name.capitalize()}",
        part.question,
        f"{part.finished} of {part.planned} runs, {part.seconds / 3600:.1f} hours of computing"
        + in_markdown(devices_used(part.devices))
        + (f", {len(part.failed)} failed" if part.failed else "")
        + f". Made by {in_code(command)} at commit {content['commit']}.",
        findings.note,
        *(_claim(claim) for claim in findings.claims),
        *(f"## {in_markdown(title)}\n\n{markdown_table(table)}" for title, table in findings.tables.items()),
        *(
            f'## {in_markdown(title)}\n\n<div class="figure" data-figure="{html.escape(f"{part.name}/{title}")}"></div>'
            for title in findings.figures
        ),
        *(["## Runs that failed", markdown_table(pd.DataFrame(failures))] if part.failed else []),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def markdown_table(table: pd.DataFrame) -> str:
    """A table in Markdown: whole numbers in full, others to four significant digits, on the right."""
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    rows = [[_cell(str(column)) for column in table.columns], ["---:" if right else "---" for right in numeric]]
    rows += [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def commit() -> str:
    """The commit of the code, where it runs from a checkout, else its version."""
    checkout = Path(__file__).parents[3]
    if not (checkout / ".git").exists():  # an installed package may lie within somebody else's repository
        return library_versions()["spectralbasis"]
    command = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return library_versions()["spectralbasis"]


def _claim(claim: Claim) -> str:
    found = f"**{claim.verdict.capitalize()}**: {claim.text}"
    if not math.isfinite(claim.effect):
        return f"{found} No finished run measures it."
    interval = f", 95 % interval {claim.low:+.4g} to {claim.high:+.4g}" if math.isfinite(claim.low) else ""
    change = f"What would change it: {claim.would_change}"
    p_value = f", p = {claim.p_value:.2g}" if math.isfinite(claim.p_value) else ""
    return f"{found} Effect {claim.effect:+.4g} {claim.unit}{interval}{p_value}; {claim.runs} runs. {change}"


def _cell(value: Any) -> str:
    if value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    text = cell(value)
    return in_markdown(" ".join(text.split("\n"))) if isinstance(value, str) else printable(text)


def _split(table: pd.DataFrame) -> dict[str, Any]:
    """A table as JSON: its columns, and its rows."""
    content: dict[str, Any] = json.loads(table.to_json(orient="split", index=False, double_precision=10))
    return content


def _drawn(figure: go.Figure) -> dict[str, Any]:
    """A figure as JSON, without the look that Plotly would add: the page has its own."""
    content: dict[str, Any] = json.loads(go.Figure(figure).update_layout(template="none").to_json())
    return content
