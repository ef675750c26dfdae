"""Commands for trained adapters, and commands that need no model; `spectralbasis.cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from spectralbasis.commands import tables
from spectralbasis.commands.options import AsJson, NewFolder, Overwrite, existing_folder
from spectralbasis.errors import InputError


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a spectral adapter.", callback=existing_folder)],
    to: Annotated[str, typer.Option(metavar="lora|merged", help="lora writes a LoRA adapter, merged a whole model.")],
    output: NewFolder,
    base: Annotated[str | None, typer.Option(help="The base model. Default: the one that the adapter names.")] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Largest rank of the LoRA adapter. Default: no limit, which is exact.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Leave out what the base lacks, instead of refusing the adapter.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a spectral adapter for use without this package: as a LoRA adapter for PEFT, or merged into its base.

    Example: `spectralbasis export adapter --to lora -o lora-adapter`
    """
    from spectralbasis.coefficients import export_lora, export_merged

    if to == "lora":
        lora = export_lora(adapter, output, base=base, rank=rank, partial=partial, overwrite=overwrite)
        tables.show_result(lora.to_dict(), tables.lora_table, as_json)
    elif to == "merged":
        if rank is not None:
            raise InputError(f"--rank {rank} applies only to a LoRA adapter; leave it out with --to merged")
        merged = export_merged(adapter, output, base=base, partial=partial, overwrite=overwrite)
        tables.show_result(merged.to_dict(), tables.merged_table, as_json)
    else:
        raise InputError(f"--to {to} is unknown; write --to lora or --to merged")


def combine(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Folders of spectral adapters of one base and basis.", callback=existing_folder),
    ],
    output: NewFolder,
    weights: Annotated[
        str | None, typer.Option(metavar="w,w,…", help="A number for each adapter. Default: 1 for each.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="sum|mean|difference|ties", help="How the coefficients are combined.")
    ] = "sum",
    density: Annotated[float, typer.Option(help="Fraction of each adapter's numbers that ties keeps.")] = 0.2,
    heads: Annotated[
        str, typer.Option(metavar="refuse|first|mean|none", help="What to do with heads, if there are any.")
    ] = "refuse",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Add, average, subtract or merge adapters of one base; the result is an adapter again.

    Example: `spectralbasis combine adapter-rte adapter-mrpc --weights 0.7,0.3 --heads first -o both`
    """
    from spectralbasis.coefficients import combine as run

    combined = run(
        adapters,
        None if weights is None else _numbers(weights),
        output=output,
        method=method,
        density=density,
        heads=heads,
        overwrite=overwrite,
    )
    tables.show_result(combined.to_dict(), tables.combination_table, as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text} must be numbers; write them with commas, such as 0.7,0.3") from None


def report(
    directory: Annotated[
        Path, typer.Argument(help="Folder that `compare -o` or `study -o` wrote.", callback=existing_folder)
    ],
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
