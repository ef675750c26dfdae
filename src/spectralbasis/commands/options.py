"""What commands have in common: options, and how they speak while they work."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from spectralbasis.printable import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]
Trust = Annotated[bool, typer.Option("--trust", help="Build also on results that another user or machine stored.")]
Model = Annotated[str, typer.Argument(help="Folder, file, or hub id of a model.")]
Leading = Annotated[
    str,
    typer.Option(
        metavar="K|FRACTION|auto|mp|gd",
        help="Number of leading directions, or the rule that sets it; auto: 64, or half of a matrix's smaller side "
        "where that is less.",
    ),
]
Tolerance = Annotated[float, typer.Option(help="Largest sine between computed and true leading subspaces.")]
Include = Annotated[list[str] | None, typer.Option(help="Glob of matrix names to take; may be given again.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob of matrix names to leave out; may be given again.")]
Ray = Annotated[str | None, typer.Option(metavar="auto|local|ADDRESS", help="Work on a Ray cluster instead.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the task's files; without it the task comes from the hub.")]


@contextmanager
def stopped_by_hand(what_now: str) -> Iterator[None]:
    """Tell a person who presses Ctrl-C what is kept; the exit code is 130, as of any program stopped so."""
    try:
        yield
    except KeyboardInterrupt:
        print(printable(f"stopped; {what_now}"), file=sys.stderr)
        raise


def draws_bars() -> bool:
    """Whether a person watches."""
    return sys.stderr.isatty()
