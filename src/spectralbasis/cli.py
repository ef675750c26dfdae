"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralbasis import adapter_commands, tables
from spectralbasis.errors import InputError, SpectralBasisError
from spectralbasis.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Measure how finetuning changes the leading singular vectors of a model, and tune by spectral coefficients.",
    epilog="Add --debug to any command to see where an error comes from.",
)

Model = Annotated[str, typer.Argument(help="Folder, file, or hub id of a model.")]
Leading = Annotated[
    str, typer.Option(metavar="K|FRACTION|mp|gd", help="Number of leading directions, and the rule that sets it.")
]
Tolerance = Annotated[float, typer.Option(help="Largest sine between computed and true leading subspaces.")]
Include = Annotated[list[str] | None, typer.Option(help="Glob of matrix names to take; may be given again.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob of matrix names to leave out; may be given again.")]
Ray = Annotated[str | None, typer.Option(metavar="auto|local|ADDRESS", help="Work on a Ray cluster instead.")]
AsJson = adapter_commands.AsJson
Task = Annotated[str, typer.Option(help="Task name, such as RTE, SST-2, mnist.")]
Data = Annotated[Path | None, typer.Option(help="Folder of the task's files; without it the task comes from the hub.")]


def main() -> None:
    """Run the command line; errors meant for people end as one paragraph and exit code 1."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments, prog_name="spectralbasis")
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(_paragraph(error), file=sys.stderr)
        sys.exit(1)


def _paragraph(error: Exception) -> str:
    if isinstance(error, SpectralBasisError):
        return f"error: {error}"
    return f"unexpected {type(error).__name__}: {error}\nRun the command again with --debug to see where it comes from."


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path("quickstart"),
) -> None:
    """Pretrain, finetune, compare and tune a small model from nothing, and write one report. No download, minutes.

    Example: `spectralbasis quickstart -o quickstart`
    """
    from spectralbasis.study.quickstart import quickstart as run

    print(run(output))


@app.command()
def basis(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="The basis file.")] = Path("basis.safetensors"),
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

    found = SpectralBasis.compute(
        model, leading, tolerance=tolerance, include=include or (), exclude=exclude or (), progress=_draws_bars()
    )
    found.save(output)
    tables.show_result(tables.basis_facts(found, output), tables.basis_table, as_json)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="The pretrained checkpoint: folder, file or hub id.")],
    tuned: Annotated[list[str], typer.Argument(help="Checkpoints or adapters finetuned from it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder for the table and the report.")] = None,
    leading: Leading = "64",
    null: Annotated[str, typer.Option(help="Null model: scrambled, gaussian or none.")] = "scrambled",
    draws: Annotated[int, typer.Option(min=1, help="Draws of the null per matrix.")] = 5,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Task of a finetuned checkpoint; given once for each, in their order."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the bootstrap.")] = 0,
    tolerance: Tolerance = 1e-4,
    include: Include = None,
    exclude: Exclude = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run into the folder stopped.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Compare nothing; say what it will take, and how long on each executor.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that measure matrices side by side.")] = 1,
    ray: Ray = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory for each process, such as 8GB; matrices that take more are read in row blocks."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where matrices are decomposed: cpu or cuda.")] = "cpu",
    trailing: Annotated[bool, typer.Option("--trailing", help="Measure the trailing directions too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what finetuning did to the leading singular vectors, against a null, with a verdict.

    Several checkpoints are also held against each other, and steps of one run (`checkpoint-100`) become a curve.

    Example: `spectralbasis compare path/to/base path/to/tuned -o comparison --leading 64`
    """
    from spectralbasis.comparison import compare as run
    from spectralbasis.comparison import plan_comparison

    what: dict[str, Any] = {
        "leading": leading,
        "null": None if null == "none" else null,
        "draws": draws,
        "include": include or (),
        "exclude": exclude or (),
        "trailing": trailing,
        "memory_budget": memory_budget,
        "ray": ray,
    }
    if plan:
        planned = plan_comparison(base, tuned, **what, workers=workers if workers > 1 else None)
        tables.show_result(planned, tables.plan_table, as_json)
        return
    if resume and output is None:
        raise InputError("--resume needs the folder of the run to go on with: add -o DIR")
    kept = "nothing is kept without -o DIR" if output is None else "what was measured is kept: go on with --resume"
    with _stopped_by_hand(kept):
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
            progress=_draws_bars(),
        )
    tables.show_result(result.summary(), tables.findings_table, as_json)
    if output is not None:
        print(f"report: {output / 'index.html'}", file=sys.stderr)


@app.command()
def tune(
    model: Model,
    task: Task,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the adapter, or of the whole model.")],
    data: Data = None,
    method: Annotated[
        str,
        typer.Option(
            help="What is trained: spectral, full, head, lora, bitfit, dora, pissa, adalora, vera, fourierft, psoft, "
            "tinylora, houlsby, parallel, adapterfusion, svft or subspace."
        ),
    ] = "spectral",
    coefficients: Annotated[
        str, typer.Option(metavar="diagonal|core|band|sparse", help="What is trained (spectral).")
    ] = "diagonal",
    bandwidth: Annotated[int, typer.Option(help="Largest distance from the diagonal (spectral, band).")] = 1,
    scaling: Annotated[
        str, typer.Option(metavar="absolute|relative|normalized", help="Unit of the coefficients (spectral).")
    ] = "normalized",
    basis: Annotated[
        str, typer.Option(metavar="pretrained|random|minor|curvature|PATH", help="Whose directions (spectral).")
    ] = "pretrained",
    leading: Annotated[
        str | None, typer.Option(metavar="K|FRACTION|mp|gd", help="Directions in each matrix (spectral).")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Share of the model's parameters to train (spectral).")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank (lora and its kin), or width (houlsby, parallel).")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale (lora); default: twice the rank.")] = None,
    n_frequency: Annotated[int | None, typer.Option(help="Numbers for each matrix (fourierft).")] = None,
    dimension: Annotated[
        int | None, typer.Option(help="Numbers for each matrix (tinylora), or altogether (subspace).")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help="Adapter to fuse; given once for each (adapterfusion).")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Adapter of the same method and size to start from.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; instead of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training examples.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in each step.")] = 32,
    max_length: Annotated[int, typer.Option(help="Tokens at which a text is cut.")] = 64,
    learning_rate: Annotated[float | None, typer.Option(help="Default: what suits the method.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Default: what suits the method.")] = None,
    seed: Annotated[int, typer.Option(help="Of the head, the order of examples and dropout.")] = 0,
    train_examples: Annotated[int | None, typer.Option(help="Use only so many training examples.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast, where it is native.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model to a task, score it on held-out data, and save it (an adapter of a few kilobytes by default).

    Example: `spectralbasis tune minilm --task RTE --data path/to/glue -o adapter --budget 0.002 --coefficients core`
    """
    from spectralbasis.study import tune as run

    with _stopped_by_hand("nothing was written: give the same command again to start anew"):
        result = run(
            model,
            task=task,
            data=data,
            output=output,
            method=method,
            coefficients=coefficients,
            bandwidth=bandwidth,
            scaling=scaling,
            basis=basis,
            leading=leading,
            budget=budget,
            rank=rank,
            alpha=alpha,
            n_frequency=n_frequency,
            dimension=dimension,
            sources=source or (),
            start=start,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            max_length=max_length,
            learning_rate=learning_rate,
            head_learning_rate=head_learning_rate,
            seed=seed,
            train_examples=train_examples,
            bf16=bf16,
            overwrite=overwrite,
            progress=_draws_bars(),
        )
    tables.show_result(result.to_dict(), tables.tuning_table, as_json)


@app.command()
def evaluate(
    model: Model,
    task: Task,
    adapter: Annotated[Path | None, typer.Argument(help="Adapter folder over the model.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Score a tuned model, or a model with an adapter, on a task's held-out data.

    Example: `spectralbasis evaluate minilm adapter --task RTE --data path/to/glue`
    """
    from spectralbasis.study import evaluate as run

    result = run(model, adapter, task=task, data=data, progress=_draws_bars())
    tables.show_result(result.to_dict(), tables.scores_table, as_json)


@app.command()
def similarity(
    checkpoints: Annotated[list[str], typer.Argument(help="Two or more adapters or checkpoints of one base.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for similarity.json and similarity.parquet.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The pretrained checkpoint; by default what the first adapter names.")
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


@app.command()
def study(
    name: Annotated[str, typer.Argument(metavar="NAME|all|quick", help="An experiment, all, or all in little time.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study; given again, it goes on.")],
    preset: Annotated[str, typer.Option(metavar="cpu|paper|quick", help="How much of everything.")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Folder with the data sets, each in a folder of its own.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    ray: Ray = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    analyse_only: Annotated[bool, typer.Option("--analyse", help="Start no run; show what those done say.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the experiments that test the claims, with their controls, and write what they show.

    Experiments: stability, sharing, scale, scratch, ablation, glue, similarity, diagnostics, reuse. Every run is done
    once: stop it any time and give the same command again.

    Example: `spectralbasis study all --preset cpu --data path/to/data -o study --jobs 2`
    """
    from spectralbasis.study.conduct import study as run

    with _stopped_by_hand("finished runs are kept: give the same command again to go on"):
        content = run(
            name, preset=preset, data=data, output=output, jobs=jobs, ray=ray, retry=retry, analyse_only=analyse_only
        )
    tables.show_result(content, tables.claims_table, as_json)
    print(f"report: {output / 'index.html'}", file=sys.stderr)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Folder that `compare -o` or `study -o` wrote.")]) -> None:
    """Write index.html again from the results of a folder.

    Example: `spectralbasis report comparison`
    """
    from spectralbasis.report import study_page, write_report, write_study_report

    is_study = (directory / study_page.RESULTS).is_file()
    print(write_study_report(directory) if is_study else write_report(directory))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show versions, threads, devices, speed and cache of this machine, and what to change.

    Example: `spectralbasis doctor`
    """
    from spectralbasis.doctor import examine

    tables.show_result(examine(), tables.machine_table, as_json)


for command in (adapter_commands.export, adapter_commands.combine):
    app.command()(command)


@contextmanager
def _stopped_by_hand(what_now: str) -> Iterator[None]:
    """Tell a person who presses Ctrl-C what is kept; the exit code is 130, as of any program stopped so."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped; {what_now}", file=sys.stderr)
        raise


def _draws_bars() -> bool:
    return sys.stderr.isatty()
