"""The commands that train models; `spectralbasis.cli` registers them."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from spectralbasis.commands import tables
from spectralbasis.commands.options import (
    AsJson,
    Data,
    Model,
    Overwrite,
    Ray,
    Task,
    Trust,
    shows_progress,
    stopped_by_hand,
)
from spectralbasis.printable import printable


def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path("quickstart"),
    as_json: AsJson = False,
) -> None:
    """Pretrain, finetune, compare and tune a small model from nothing, and write one report. No download, minutes.

    Example: `spectralbasis quickstart -o quickstart`
    """
    from spectralbasis.training.quickstart import quickstart as run

    tables.show_report(run(output), as_json)


def tune(
    model: Model,
    task: Task,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write the adapter, or the whole model, to.")
    ],
    data: Data = None,
    method: Annotated[
        str,
        typer.Option(
            help="Method: spectral, full, head, lora, bitfit, dora, pissa, adalora, vera, fourierft, psoft, "
            "tinylora, svft or subspace. houlsby, parallel and adapterfusion need the extra `baselines`, in an "
            "environment with transformers 4.57."
        ),
    ] = "spectral",
    coefficients: Annotated[
        str, typer.Option(metavar="diagonal|core|band|sparse", help="Entries of C that are trained (spectral).")
    ] = "diagonal",
    bandwidth: Annotated[int, typer.Option(help="Largest distance from the diagonal (spectral, band).")] = 1,
    scaling: Annotated[
        str, typer.Option(metavar="absolute|relative|normalized", help="Unit of the coefficients (spectral).")
    ] = "normalized",
    basis: Annotated[
        str,
        typer.Option(
            metavar="pretrained|random|minor|curvature|PATH", help="Where the directions come from (spectral)."
        ),
    ] = "pretrained",
    leading: Annotated[
        str | None,
        typer.Option(
            metavar="K|FRACTION|mp|gd",
            help="Directions in each matrix (spectral). Default: 64, or what --budget gives.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Share of the model's parameters to train, such as 0.002 (spectral). Default: what --leading gives."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank (lora and variants) or width (houlsby, parallel). Default: 8; psoft 32, vera 256, tinylora 2."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Scale (lora, dora, adalora). Default: twice the rank.")] = None,
    n_frequency: Annotated[int | None, typer.Option(help="Numbers for each matrix (fourierft). Default: 1000.")] = None,
    dimension: Annotated[
        int | None,
        typer.Option(help="Numbers for each matrix (tinylora, default: 64) or in all (subspace, default: 1000)."),
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help="Adapter to fuse; repeatable (adapterfusion). Default: none.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Adapter of the same method and size to start from. Default: none.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of --epochs. Default: what --epochs gives.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training examples. Default: 3.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in each step.")] = 32,
    max_length: Annotated[int, typer.Option(help="Texts are cut after this many tokens.")] = 64,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate in the backbone. Default: the method's, such as 0.03 (spectral)."),
    ] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the head. Default: the method's, such as 0.006 (spectral).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the head, the order of examples and dropout.")] = 0,
    train_examples: Annotated[
        int | None, typer.Option(help="Use only this many training examples. Default: all.")
    ] = None,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train under bfloat16 autocast, where the hardware supports it.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model to a task, score it on held-out data, and save it (an adapter of a few kilobytes by default).

    Example: `spectralbasis tune minilm --task RTE --data path/to/glue -o adapter --budget 0.002 --coefficients core`
    """
    from spectralbasis.training import tune as run

    with stopped_by_hand("nothing was written: give the same command again to start anew"):
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
            progress=shows_progress(),
        )
    tables.show_result(result.to_dict(), tables.tuning_table, as_json)


def evaluate(
    model: Model,
    task: Task,
    adapter: Annotated[Path | None, typer.Argument(help="Adapter folder over the model. Default: none.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Score a tuned model, or a model with an adapter, on a task's held-out data.

    Example: `spectralbasis evaluate minilm adapter --task RTE --data path/to/glue`
    """
    from spectralbasis.training import evaluate as run

    result = run(model, adapter, task=task, data=data, progress=shows_progress())
    tables.show_result(result.to_dict(), tables.scores_table, as_json)


def study(
    name: Annotated[
        str, typer.Argument(metavar="NAME|all|quick", help="An experiment; all; or quick, all of them in little time.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study; a study in it is continued.")],
    preset: Annotated[str, typer.Option(metavar="cpu|paper|quick", help="Size of the models, data and seeds.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets, each in its own folder. Default: none.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in its own process.")] = 1,
    ray: Ray = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed.")] = False,
    analyse_only: Annotated[
        bool, typer.Option("--analyse", help="Start no run; analyse those that are finished.")
    ] = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Run the experiments that test the claims, with their controls, and write what they show.

    Experiments: stability, sharing, scale, scratch, ablation, glue, similarity, diagnostics, reuse. Each run is done
    once: stop the study at any time and give the same command again. Three arms of glue need the extra `baselines`, in
    an environment with transformers 4.57; elsewhere their runs fail with that reason, and the others continue.

    Example: `spectralbasis study all --preset cpu --data path/to/data -o study --jobs 2`
    """
    from spectralbasis.study.conduct import study as run

    with stopped_by_hand("finished runs are kept: give the same command again to continue"):
        content = run(
            name,
            preset=preset,
            data=data,
            output=output,
            jobs=jobs,
            ray=ray,
            retry=retry,
            analyse_only=analyse_only,
            trust=trust,
        )
    tables.show_result(content, tables.claims_table, as_json)
    print(printable(f"report: {output / 'index.html'}"), file=sys.stderr)
