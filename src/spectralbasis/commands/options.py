"""Options that commands share, and what commands print while they work.

The help states every default: typer shows it, except for None, where the help text has to.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from spectralbasis.locations import check_exist, check_folders
from spectralbasis.printable import printable

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
NewFolder = Annotated[Path, typer.Option("-o", "--output", help="A new folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder of an earlier run.")]
Trust = Annotated[bool, typer.Option("--trust", help="Also use results that another user or machine stored.")]


def existing(given: str | list[str]) -> str | list[str]:
    """Refuse a model that does not exist while a command is parsed, before anything large is imported."""
    check_exist([given] if isinstance(given, str) else given)
    return given


def existing_folder(given: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse a folder that does not exist while a command is parsed, before anything large is imported."""
    check_folders(given if isinstance(given, list) else [given])
    return given


Model = Annotated[str, typer.Argument(help="Folder, file, or hub id of a model.", callback=existing)]
Base = Annotated[str, typer.Argument(help="The pretrained checkpoint: folder, file or hub id.", callback=existing)]
Leading = Annotated[
    str,
    typer.Option(
        metavar="K|FRACTION|auto|mp|gd",
        help="Number of leading directions, or the rule that sets it. auto is 64, or half of a matrix's smaller side "
        "where that is less.",
    ),
]
Tolerance = Annotated[float, typer.Option(help="Largest sine between computed and true leading subspaces.")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Glob of matrix names to take; repeatable. Default: all but embeddings and heads."),
]
IncludeAll = Annotated[
    list[str] | None, typer.Option("--include", help="Glob of names to take; repeatable. Default: everything.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Glob of matrix names to leave out; repeatable. Default: none.")
]
Partial = Annotated[
    bool, typer.Option("--partial", help="Accept an adapter even if the base lacks some of what it adapts.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue where an earlier run into the folder stopped.")]
Workers = Annotated[int, typer.Option(help="Processes that work on matrices at the same time.")]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for each process, such as 8GB; larger matrices are read in row blocks. Default: what is free.",
    ),
]
Device = Annotated[str, typer.Option(help="Device that decomposes matrices: cpu or cuda.")]
Ray = Annotated[
    str | None, typer.Option(metavar="auto|local|ADDRESS", help="Run on a Ray cluster. Default: on this machine.")
]
Data = Annotated[
    Path | None, typer.Option(help="Folder of the task's files. Default: the hub or scikit-learn, where they have it.")
]


@contextmanager
def stopped_by_hand(kept: str) -> Iterator[None]:
    """Say what is kept when a person presses Ctrl-C; the exit code is 130, as usual for that."""
    try:
        yield
    except KeyboardInterrupt:
        print(printable(f"stopped; {kept}"), file=sys.stderr)
        raise


def shows_progress() -> bool:
    """Whether stderr is a terminal, on which a progress bar can be drawn."""
    return sys.stderr.isatty()
