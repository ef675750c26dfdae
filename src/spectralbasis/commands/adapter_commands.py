"""Commands for trained adapters, and commands that need no model; `spectralbasis.cli` registers them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from spectralbasis.commands import tables
from spectralbasis.commands.options import (
    AsJson,
    Base,
    Device,
    Exclude,
    IncludeAll,
    MemoryBudget,
    NewFolder,
    Overwrite,
    Partial,
    Ray,
    Resume,
    Workers,
    existing,
    existing_folder,
    shows_progress,
    stopped_by_hand,
)
from spectralbasis.errors import InputError
from spectralbasis.printable import printable


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


def extract(
    base: Base,
    tuned: Annotated[
        str, typer.Argument(help="The checkpoint, or adapter, that was finetuned from it.", callback=existing)
    ],
    output: NewFolder,
    to: Annotated[
        str,
        typer.Option(
            metavar="lora|spectral",
            help="lora writes the best factors of the update, spectral its projection on the base's directions.",
        ),
    ] = "lora",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of each matrix. Default: 16.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Instead: the share of each update's energy to reach. Default: --rank."),
    ] = None,
    total_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Instead: the sum of all ranks, shared out for most energy. Default: none."),
    ] = None,
    drop_intruders: Annotated[
        bool, typer.Option("--drop-intruders", help="Leave out what the update does in intruder directions.")
    ] = False,
    vllm: Annotated[bool, typer.Option("--vllm", help="Round the rank up to one that vLLM takes.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="File (.csv, .jsonl) with a column text, on which outputs are compared. Default: none."),
    ] = None,
    include: IncludeAll = None,
    exclude: Exclude = None,
    partial: Partial = False,
    resume: Resume = False,
    workers: Workers = 1,
    ray: Ray = None,
    memory_budget: MemoryBudget = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Turn a finetuned checkpoint into an adapter of its base: a LoRA, or a spectral adapter.

    Example: `spectralbasis extract path/to/base path/to/tuned -o adapter --rank 16`
    """
    from spectralbasis.coefficients import extract as run

    with stopped_by_hand("what was decomposed is kept: continue with --resume"):
        found = run(
            base,
            tuned,
            output,
            to=to,
            rank=rank,
            energy=energy,
            total_rank=total_rank,
            drop_intruders=drop_intruders,
            vllm=vllm,
            check=check,
            include=include or (),
            exclude=exclude or (),
            partial=partial,
            device=device,
            workers=workers,
            ray=ray,
            memory_budget=memory_budget,
            resume=resume,
            overwrite=overwrite,
            progress=shows_progress(),
        )
    tables.show_result(found.to_dict(), tables.extraction_table, as_json)
    for name, reason in found.left_out.items():
        print(printable(f"left out: {name}: {reason}"), file=sys.stderr)


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
