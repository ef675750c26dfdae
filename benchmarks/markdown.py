"""Pieces of the documentation's tables."""

from collections.abc import Sequence
from typing import Any


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def versions(found: dict[str, Any], *packages: str) -> str:
    """The versions that results were measured with, as a sentence."""
    return (
        ", ".join(f"{package} {found['versions'][package]}" for package in ("spectralbasis", "torch", *packages)) + "."
    )


def machine(found: dict[str, Any]) -> str:
    """The machine that times were measured on, as a sentence."""
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    accelerator = f"{found['device']}; " if "device" in found else ""
    return f"{accelerator}{found['processor']}, {threads} of {found['cores']} cores."


def met(reached: bool) -> str:
    """Whether a goal was reached."""
    return "met" if reached else "**missed**"
