"""The commands that measure checkpoints; `spectralbasis.cli` registers them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralbasis.commands import tables
from spectralbasis.commands.options import (
    AsJson,
    Base,
    Device,
    Exclude,
    Include,
    Leading,
    MemoryBudget,
    Model,
    Partial,
    Ray,
    Resume,
    Tolerance,
    Trust,
    Workers,
    existing,
    shows_progress,
    stopped_by_hand,
)
from spectralbasis.comparison.gate import check_askable, held, parse_condition
from spectralbasis.comparison.nulls import NULLS
from spectralbasis.errors import InputError
from spectralbasis.printable import printable

_NULL_HELP = f"Null model: {'; '.join(f'{null.name}, {null.update}' for null in NULLS.values())}; or none."


def _readable(texts: list[str] | None) -> list[str] | None:
    """Refuse a condition of --fail-if that cannot be read, with exit code 2, before anything is opened."""
    try:
        [parse_condition(text) for text in texts or ()]
    except InputError as error:
        raise typer.BadParameter(str(error)) from error
    return texts


def basis(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write the basis to.")] = Path(
        "basis.safetensors"
    ),
    leading: Leading = "64",
    tolerance: Tolerance = 1e-4,
    include: Include = None,
    exclude: Exclude = None,
    as_json: AsJson = False,
) -> None:
    """Compute the leading singular triplets of every weight matrix and save them in one file.

    Example: `spectralbasis basis path/to/model -o basis.safetensors --leading 64`
    """
    from spectralbasis.basis import SpectralBasis
    from spectralbasis.files import check_replaceable

    check_replaceable(output)
    found = SpectralBasis.compute(
        model, leading, tolerance=tolerance, include=include or (), exclude=exclude or (), progress=shows_progress()
    )
    found.save(output)
    tables.show_result(tables.basis_facts(found, output), tables.basis_table, as_json)


def compare(
    base: Base,
    tuned: Annotated[list[str], typer.Argument(help="Checkpoints or adapters finetuned from it.", callback=existing)],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the table and the report. Default: nothing is written."),
    ] = None,
    leading: Leading = "auto",
    null: Annotated[str, typer.Option(help=_NULL_HELP)] = "scrambled",
    draws: Annotated[
        int | None,
        typer.Option(
            min=1, help="Draws of the null per matrix. Default: its closed form; 5 draws where that does not hold."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK", help="Task of a finetuned checkpoint; once for each, in their order. Default: unknown."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the bootstrap.")] = 0,
    tolerance: Tolerance = 1e-4,
    include: Include = None,
    exclude: Exclude = None,
    resume: Resume = False,
    trust: Trust = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only print the work, the memory and the expected time; compare nothing.")
    ] = False,
    workers: Workers = 1,
    ray: Ray = None,
    memory_budget: MemoryBudget = None,
    partial: Partial = False,
    device: Device = "cpu",
    trailing: Annotated[bool, typer.Option("--trailing", help="Measure the trailing directions too.")] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="End with exit code 3 if this holds, such as 'overlap<0.9' (the mean over matrices), "
            "'min:overlap<0.5', 'verdict=contradicted' or 'unpaired>0'; repeatable. Default: none.",
            callback=_readable,
            is_eager=True,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what finetuning did to the leading singular vectors, against a null, with a verdict.

    Several checkpoints are also compared with each other, and steps of one run (`checkpoint-100`) become a curve.

    Example: `spectralbasis compare path/to/base path/to/tuned -o comparison --leading 64`
    """
    from spectralbasis.comparison import compare as run
    from spectralbasis.comparison import plan_comparison

    conditions = [parse_condition(text) for text in fail_if or ()]
    try:
        check_askable(conditions, trailing=trailing, null=null != "none")
    except InputError as error:
        raise typer.BadParameter(str(error), param_hint="--fail-if") from error
    what: dict[str, Any] = {
        "leading": leading,
        "null": None if null == "none" else null,
        "draws": draws,
        "include": include or (),
        "exclude": exclude or (),
        "partial": partial,
        "trailing": trailing,
        "memory_budget": memory_budget,
        "ray": ray,
    }
    if plan:
        planned = plan_comparison(base, tuned, **what, workers=workers if workers > 1 else None)
        tables.show_result(planned, tables.plan_table, as_json)
        return
    if resume and output is None:
        raise InputError("--resume needs the folder of the run to continue: add -o DIR")
    kept = "nothing is kept without -o DIR" if output is None else "what was measured is kept: continue with --resume"
    with stopped_by_hand(kept):
        result = run(
            base,
            tuned,
            **what,
            tasks=label or None,
            seed=seed,
            tolerance=tolerance,
            device=device,
            workers=workers,
            output=output,
            resume=resume,
            trust=trust,
            progress=shows_progress(),
        )
    if not result.summary()["matrices"]:
        raise InputError(" ".join(result.summary()["notes"]))
    tables.show_result(result.summary(), tables.findings_table, as_json)
    if output is not None:
        print(printable(f"report: {output / 'index.html'}"), file=sys.stderr)
    if reasons := held(conditions, result.table, result.summary()):
        for reason in reasons:
            print(printable(f"failed: {reason}"), file=sys.stderr)
        raise typer.Exit(3)


def similarity(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Two or more adapters or checkpoints of one base.", callback=existing)
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder for similarity.json and similarity.parquet. Default: nothing is written."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The pretrained checkpoint. Default: the one that the first adapter names.")
    ] = None,
    of: Annotated[
        str, typer.Option(metavar="both|coefficients|updates", help="What to compare; coefficients need no base.")
    ] = "both",
    include: Include = None,
    exclude: Exclude = None,
    as_json: AsJson = False,
) -> None:
    """Compare trained coefficients, and the updates that they make, by their cosines.

    Example: `spectralbasis similarity adapter-rte adapter-mrpc -o similarity`
    """
    from spectralbasis.coefficients import similarity as run

    result = run(checkpoints, base=base, of=of, include=include or (), exclude=exclude or (), output=output)
    tables.show_result(result.to_dict(), tables.similarity_table, as_json)
