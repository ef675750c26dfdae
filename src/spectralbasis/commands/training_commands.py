"""The commands that train models; `spectralbasis.cli` registers them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from spectralbasis.commands import tables
from spectralbasis.commands.options import AsJson, Data, Model, Overwrite, Ray, Trust, draws_bars, stopped_by_hand
from spectralbasis.extras import require_extra
from spectralbasis.printable import printable
from spectralbasis.training.known_tasks import tasks_in_words
from spectralbasis.training.methods import methods_in_words, owners

Task = Annotated[str, typer.Option(metavar="NAME", help=f"Name of a task: {tasks_in_words()}.")]


def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write to.")] = Path("quickstart"),
    as_json: AsJson = False,
) -> None:
    """Pretrain, finetune, compare and tune a small model from nothing, and write one report. No download, minutes.

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`.

    Example: `spectralbasis quickstart -o quickstart`
    """
    require_extra("tune", "the quickstart")
    from spectralbasis.training.quickstart import quickstart as run

    tables.show_report(run(output), as_json)


def tune(
    model: Model,
    task: Task,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the adapter, or of the whole model.")],
    data: Data = None,
    method: Annotated[str, typer.Option(metavar="NAME", help=f"What is trained: {methods_in_words()}.")] = "spectral",
    coefficients: Annotated[
        str, typer.Option(metavar="diagonal|core|band|sparse", help=f"What is trained ({owners('coefficients')}).")
    ] = "diagonal",
    bandwidth: Annotated[
        int, typer.Option(help=f"Largest distance from the diagonal, for band ({owners('bandwidth')}).")
    ] = 1,
    scaling: Annotated[
        str,
        typer.Option(metavar="absolute|relative|normalized", help=f"Unit of the coefficients ({owners('scaling')})."),
    ] = "normalized",
    basis: Annotated[
        str,
        typer.Option(metavar="pretrained|random|minor|curvature|PATH", help=f"Whose directions ({owners('basis')})."),
    ] = "pretrained",
    leading: Annotated[
        str | None, typer.Option(metavar="K|FRACTION|mp|gd", help=f"Directions in each matrix ({owners('leading')}).")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help=f"Share of the model's parameters to train ({owners('budget')}).")
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"Rank or width of what is added ({owners('rank')}).")] = None,
    alpha: Annotated[float | None, typer.Option(help=f"Scale; default: twice the rank ({owners('alpha')}).")] = None,
    n_frequency: Annotated[int | None, typer.Option(help=f"Numbers for each matrix ({owners('n_frequency')}).")] = None,
    dimension: Annotated[
        int | None, typer.Option(help=f"Numbers for each matrix, or in all for subspace ({owners('dimension')}).")
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help=f"Adapter to fuse; given once for each ({owners('sources')}).")
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
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model to a task, score it on held-out data, and save it (an adapter of a few kilobytes by default).

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`.

    Example: `spectralbasis tune minilm --task RTE --data path/to/glue -o adapter --budget 0.002 --coefficients core`
    """
    require_extra("tune", "the command tune")
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
            progress=draws_bars(),
        )
    tables.show_result(result.to_dict(), tables.tuning_table, as_json)


def evaluate(
    model: Model,
    task: Task,
    adapter: Annotated[Path | None, typer.Argument(help="Adapter folder over the model.")] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Score a tuned model, or a model with an adapter, on a task's held-out data.

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`.

    Example: `spectralbasis evaluate minilm adapter --task RTE --data path/to/glue`
    """
    require_extra("tune", "the command evaluate")
    from spectralbasis.training import evaluate as run

    result = run(model, adapter, task=task, data=data, progress=draws_bars())
    tables.show_result(result.to_dict(), tables.scores_table, as_json)


def study(
    name: Annotated[str, typer.Argument(metavar="NAME|all|quick", help="An experiment, all, or all in little time.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study; given again, it goes on.")],
    preset: Annotated[str, typer.Option(metavar="cpu|paper|quick", help="How much of everything.")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Folder with the data sets, each in a folder of its own.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each in a process of its own.")] = 1,
    ray: Ray = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    analyse_only: Annotated[bool, typer.Option("--analyse", help="Start no run; show what those done say.")] = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Run the experiments that test the claims, with their controls, and write what they show.

    Needs the extra `study`: `pip install 'spectralbasis[study]'`. Every run is done once: stop it any time and give the
    same command again. Three arms of glue need the extra `baselines`, which needs an environment of its own with
    transformers 4.57; elsewhere their runs fail, with that reason, and the others go on.

    Example: `spectralbasis study all --preset cpu --data path/to/data -o study --jobs 2`
    """
    require_extra("study", "the study")
    from spectralbasis.study.conduct import study as run

    with stopped_by_hand("finished runs are kept: give the same command again to go on"):
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


class StudyCommand(TyperCommand):
    """`study`, whose help lists the experiments: their records are imported when it is shown, which takes seconds."""

    @property
    def help(self) -> str | None:
        """The docstring of `study`, and the name and the question of each experiment."""
        from spectralbasis.study.experiments import EXPERIMENTS

        listed = "\n".join(f"- `{name}`: {experiment.question}" for name, experiment in EXPERIMENTS.items())
        text, example = (self._help or "").split("\n\nExample:")
        return f"{text}\n\nExperiments:\n\n{listed}\n\nExample:{example}"

    @help.setter
    def help(self, text: str | None) -> None:
        self._help = text


CLASSES: dict[Any, dict[str, Any]] = {
    study: {"cls": StudyCommand, "short_help": "Run the experiments that test the claims, and write what they show."}
}
"""What a command is registered with beside its function."""
