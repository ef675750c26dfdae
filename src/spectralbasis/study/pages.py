"""Write a study as files: `results.json`, `figures.json`, and a Markdown page for each experiment."""

import html
import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from spectralbasis.files import atomic_path
from spectralbasis.printable import in_code, in_markdown, printable
from spectralbasis.report.study_page import (
    FIGURES,
    OVERVIEW,
    RESULTS,
    STATED,
    cell,
    devices_used,
    read_figures,
    read_study,
    two_digits,
)
from spectralbasis.study.claims import Claim, Findings
from spectralbasis.training.outcomes import write_json
from spectralbasis.version import library_versions


@dataclass(frozen=True)
class Part:
    """One experiment of a study: how much of it is done, and what that shows.

    `failed` is run → reason, `devices` is the name of a device → how many of the finished runs it did.
    """

    name: str
    title: str
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
            "title": self.title,
            "question": self.question,
            "answer": self.findings.answer or answer_of(self.findings.claims),
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
    with atomic_path(folder / OVERVIEW) as temporary:
        temporary.write_text(overview(content), encoding="utf-8")
    write_json(folder / RESULTS, content)
    return content


def answer_of(claims: Sequence[Claim]) -> str:
    """An answer in the words of the first primary claim, for an experiment that gives none."""
    first = next((claim for claim in claims if claim.primary), None)
    if first is None:
        return ""
    said = f"{first.text} ({{effect}}; {{units}})"
    return first.tell(f"Supported: {said}", f"Contradicted: {said}", f"Undecided: {said}")


def overview(content: Mapping[str, Any]) -> str:
    """The Markdown page with a row for each experiment of `results.json`: question, answer, what would change it."""
    rows = ["| question | answer | what would change it |", "| --- | --- | --- |"]
    for name, part in content["experiments"].items():
        change = next((claim["would_change"] for claim in part["claims"] if claim["primary"]), "")
        link = f"[{in_markdown(part['title'])}]({name}.md)"
        rows.append(f"| {link} | {in_markdown(part['answer'])} | {in_markdown(change)} |")
    lines = [
        "# Results of the study",
        "Each answer is made from the numbers of the experiment's primary claims: the effect, its 95 % interval in "
        "parentheses, and what the interval is over. A claim is supported or contradicted where the whole interval is "
        "on one side of zero, or of the margin that it allows, and its p-value, adjusted for the claims that were "
        "asked together, is below 0.05. Everything else is undecided, which is no evidence that there is no effect.",
        "\n".join(rows),
        f"Preset {content['preset']}. Made by {in_code(content['command'])} at commit {content['commit']}.",
    ]
    return "\n\n".join(lines) + "\n"


def page(part: Part, content: Mapping[str, Any]) -> str:
    """The Markdown page of one experiment: question, answer, figure, claims, and then the details."""
    findings, facts = part.findings, part.to_dict()
    command = content["command"].replace("study all", f"study {part.name}")
    failures = {"run": list(part.failed), "reason": list(part.failed.values())}
    primary = [claim for claim in findings.claims if claim.primary]
    others = [claim for claim in findings.claims if not claim.primary]
    figures = [
        f'## {in_markdown(title)}\n\n<div class="figure" data-figure="{html.escape(f"{part.name}/{title}")}"></div>'
        for title in findings.figures
    ]
    lines = [
        f"# {in_markdown(part.title)}",
        in_markdown(part.question),
        f"**{in_markdown(facts['answer'])}**" if facts["answer"] else "",
        *figures[:1],
        *(["## Claims", claims_table(primary), *_changes(primary)] if primary else []),
        *(["## Exploration", EXPLORATION, claims_table(others)] if others else []),
        *_words(findings),
        "## How to read it",
        in_markdown(findings.note),
        f"{part.finished} of {part.planned} runs, {part.seconds / 3600:.1f} hours of computing"
        + in_markdown(devices_used(part.devices))
        + (f", {len(part.failed)} failed" if part.failed else "")
        + f". Made by {in_code(command)} at commit {content['commit']}.",
        *(f"## {in_markdown(title)}\n\n{markdown_table(table)}" for title, table in findings.tables.items()),
        *figures[1:],
        *(["## Runs that failed", markdown_table(pd.DataFrame(failures))] if part.failed else []),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


EXPLORATION = (
    "These claims suggest what to ask next. They are not what the experiment is about, and establish nothing by "
    "themselves."
)


def claims_table(claims: Sequence[Claim]) -> str:
    """Claims as a table in Markdown: verdict, claim and when it was asked, effect with interval, p-value, units."""
    rows = ["| verdict | claim | effect (95 % interval) | p, adjusted | units |", "| --- | --- | --- | ---: | --- |"]
    for claim in claims:
        interval = f" ({two_digits(claim.low)} to {two_digits(claim.high)})" if math.isfinite(claim.low) else ""
        effect = f"{two_digits(claim.effect)}{interval} {claim.unit}" if math.isfinite(claim.effect) else "none"
        asked = f" *({STATED[claim.stated]})*" if STATED[claim.stated] else ""
        p_value = f"{claim.p_value:.2g}" if math.isfinite(claim.p_value) else ""
        shown = (effect, p_value, claim.units)
        rows.append(
            f"| **{claim.verdict}** | {in_markdown(claim.text)}{asked} | {' | '.join(map(in_markdown, shown))} |"
        )
    return "\n".join(rows)


def _changes(claims: Sequence[Claim]) -> list[str]:
    """What would change the verdicts, those of equal words together."""
    changes = dict.fromkeys(claim.would_change for claim in claims)
    return ["What would change a verdict:", "\n".join(f"- {in_markdown(change)}" for change in changes)]


WORDS = {
    "overlap": "how much of one subspace lies in another of equal dimension: 1 is the same, 0 is none of it",
    "rotation": "1 − overlap, averaged over matrices and both sides",
    "null": "what a random update gives that has the size and the singular values of the real one",
    "scrambled": "an update whose rows, columns and signs are shuffled: as large, with the same singular values",
    "halvings": "how often the null's rotation was halved: 0 is as much, +1 is half as much, -1 is twice as much",
    "held": "halvings of the null's rotation, log2((1 − overlap of the null) / (1 − overlap))",
    "coverage": "the share of the update's squared norm that lies in given directions",
    "core": "all coefficients between the first k left and the first k right singular directions, k × k numbers",
    "diagonal": "one coefficient for each pair of singular vectors, k numbers",
    "band": "the diagonal and its neighbours",
    "leading": "singular directions of the largest singular values of the pretrained weights",
    "trailing": "singular directions of the smallest singular values",
    "doublings": "how often chance was doubled: 0 is as much as chance, +1 is twice as much",
    "curvature": "directions along which the loss of a task changes most, from its gradients",
    "Spearman": "Spearman's rho, a correlation of ranks, from -1 to +1",
    "decade": "a factor of ten",
    "cell": "one kind of coefficients with one number of them, on one model",
}  # fmt: skip
"""Words of the field and of the study → what they mean."""


def _words(findings: Findings) -> list[str]:
    """The meaning of those of `WORDS` that the claims, the answer and the tables use."""
    columns = [str(column) for table in findings.tables.values() for column in table.columns]
    said = [part for claim in findings.claims for part in (claim.text, claim.unit, claim.units)]
    text = " ".join([findings.answer, *said, *columns])
    used = {word: meaning for word, meaning in WORDS.items() if re.search(rf"\b{word}", text, re.IGNORECASE)}
    listed = "\n".join(f"- **{word}**: {in_markdown(meaning)}." for word, meaning in used.items())
    return ["## Words on this page", listed] if used else []


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
