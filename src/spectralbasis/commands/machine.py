"""The commands that need no model; `spectralbasis.cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from spectralbasis import tables
from spectralbasis.commands.options import AsJson


def report(
    directory: Annotated[Path, typer.Argument(help="Folder that `compare -o` or `study -o` wrote.")],
    as_json: AsJson = False,
) -> None:
    """Write index.html again from the results of a folder.

    Example: `spectralbasis report comparison`
    """
    from spectralbasis.report import study_page, write_report, write_study_report

    is_study = (directory / study_page.RESULTS).is_file()
    tables.show_report(write_study_report(directory) if is_study else write_report(directory), as_json)


def doctor(as_json: AsJson = False) -> None:
    """Show versions, threads, devices, speed and cache of this machine, and what to change.

    Example: `spectralbasis doctor`
    """
    from spectralbasis.doctor import examine

    tables.show_result(examine(), tables.machine_table, as_json)
