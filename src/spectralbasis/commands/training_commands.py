"""The commands that train models; `spectralbasis.cli` registers them."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from spectralbasis.commands import tables
from spectralbasis.commands.options import (
    AsJson,
    Data,
    Model,
    Overwrite,
    Ray,
    Trust,
    existing_folder,
    shows_progress,
    stopped_by_hand,
)
from spectralbasis.extras import require_extra
from spectralbasis.kinds import DEFAULT_COEFFICIENTS, KINDS, kinds_in_words, kinds_with, leading_in_words
from spectralbasis.printable import printable
from spectralbasis.training.known_tasks import tasks_in_words
from spectralbasis.training.methods import ALSO, methods_in_words, owners

Task = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"Name of a task, instead of your data: {tasks_in_words()}. Default: none."),
]
Kind = Annotated[
    str | None,
    typer.Option(
        metavar="classification|regression|language|instructions|images",
        help="What the table is for. Default: by its columns; labels that are numbers are a regression.",
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="Column of text; give it twice for pairs. Default: found by name."),
]
Label = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels. Default: found by name.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Texts are cut after this many tokens. Default: that of the tuning.")
]


def _one_of(first: str, one: str | None, second: str, other: str | None) -> None:
    """Refuse both and neither of two options."""
    if (one is None) == (other is None):
        found = "neither was given" if one is None else "both were given"
        raise typer.BadParameter(f"give {first} with the name of a task, or {second} with your own data; {found}")


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
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write the adapter, or the whole model, to.")
    ],
    task: Task = None,
    data: Data = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|HUB_ID",
            help="Your data: CSV, TSV, JSON lines, Parquet or text, a saved data set, a folder with one folder of "
            "pictures for each class, or a data set of the hub. Default: none.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR|HUB_ID", help="Rows to score on. Default: a tenth of the rows is held out."),
    ] = None,
    kind: Kind = None,
    text: Text = None,
    label: Label = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"Method of training: {methods_in_words()}.")
    ] = "spectral",
    coefficients: Annotated[
        str,
        typer.Option(
            metavar="|".join(KINDS), help=f"What is trained of C ({owners('coefficients')}): {kinds_in_words()}."
        ),
    ] = DEFAULT_COEFFICIENTS,
    bandwidth: Annotated[
        int,
        typer.Option(
            help=f"Largest distance from the diagonal, for {kinds_with('bandwidth')} ({owners('bandwidth')})."
        ),
    ] = 1,
    block_size: Annotated[
        int, typer.Option(help=f"Size of a block, for {kinds_with('block_size')} ({owners('block_size')}).")
    ] = 8,
    scaling: Annotated[
        str,
        typer.Option(metavar="absolute|relative|normalized", help=f"Unit of the coefficients ({owners('scaling')})."),
    ] = "normalized",
    basis: Annotated[
        str,
        typer.Option(
            metavar="pretrained|random|minor|curvature|PATH",
            help=f"Where the directions come from ({owners('basis')}).",
        ),
    ] = "pretrained",
    basis_seed: Annotated[int, typer.Option(help=f"Seed of a random basis ({owners('basis_seed')}).", min=0)] = 0,
    leading: Annotated[
        str | None,
        typer.Option(
            metavar="K|FRACTION|mp|gd",
            help=f"Directions in each matrix ({owners('leading')}). Default: {leading_in_words()}, or what --budget "
            "gives.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the model's parameters to train, such as 0.002 ({owners('budget')}). Default: what "
            "--leading gives."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help=f"Rank or width of what is added ({owners('rank')}). Default: 8; psoft 32, vera 256, tinylora 2."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help=f"Scale ({owners('alpha')}). Default: twice the rank.")] = None,
    n_frequency: Annotated[
        int | None, typer.Option(help=f"Numbers for each matrix ({owners('n_frequency')}). Default: 1000.")
    ] = None,
    dimension: Annotated[
        int | None,
        typer.Option(
            help=f"Numbers per matrix, or in total for subspace ({owners('dimension')}). Default: 64; subspace 1000."
        ),
    ] = None,
    source: Annotated[
        list[Path] | None, typer.Option(help=f"Adapter to fuse; repeatable ({owners('sources')}). Default: none.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(ALSO),
            help=f"What to train besides: biases of the adapted layers, or layer norms; repeatable ({owners('also')}). "
            "Default: none.",
        ),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Adapter of the same method and size to start from. Default: none.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of --epochs. Default: what --epochs gives.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training examples. Default: 3.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in each step.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option(help="Texts are cut after this many tokens. Default: 64; running text and instructions 256."),
    ] = None,
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
    gradient_accumulation: Annotated[
        int, typer.Option(help="Parts in which each batch goes through the model, to save memory.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again, to save memory.")
    ] = False,
    packing: Annotated[
        bool, typer.Option("--packing", help="Put several texts into one sequence (running text and instructions).")
    ] = False,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after this many of ten validations in a row without a better score, and keep the best. Default: "
            "train to the end."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tune a model to your data or to a named task, score it on held-out rows, and save an adapter of a few kilobytes.

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`. What the columns mean is found and said; `--kind`,
    `--text` and `--label` set it. A training of over a minute that was killed goes on with the same command.

    Example: `spectralbasis tune minilm --train reviews.csv -o adapter`

    Example: `spectralbasis tune minilm --train pairs.tsv --text question --text answer --label fits -o adapter`

    Example: `spectralbasis tune path/to/llama --train chats.jsonl --validation more.jsonl --packing -o adapter`

    Example: `spectralbasis tune minilm --task RTE --data path/to/glue -o adapter --budget 0.002 --coefficients core`
    """
    _one_of("--task", task, "--train", train)
    require_extra("tune", "the command tune")
    from spectralbasis.training import tune as run
    from spectralbasis.training.fitting import is_main_process

    with stopped_by_hand("nothing was written: run the same command again"):
        result = run(
            model,
            task=task,
            data=data,
            train=train,
            validation=validation,
            kind=kind,
            text=text or (),
            label=label,
            output=output,
            method=method,
            coefficients=coefficients,
            bandwidth=bandwidth,
            block_size=block_size,
            basis_seed=basis_seed,
            scaling=scaling,
            basis=basis,
            leading=leading,
            budget=budget,
            rank=rank,
            alpha=alpha,
            n_frequency=n_frequency,
            dimension=dimension,
            sources=source or (),
            also=also or (),
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
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            packing=packing,
            patience=patience,
            overwrite=overwrite,
            progress=shows_progress(),
        )
    if is_main_process():
        tables.show_result(result.to_dict(), tables.tuning_table, as_json)


def evaluate(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Argument(help="Adapter folder over the model. Default: none.", callback=existing_folder)
    ] = None,
    task: Task = None,
    data: Data = None,
    test: Annotated[
        str | None,
        typer.Option(metavar="FILE|DIR|HUB_ID", help="Your data with labels, as for `tune --train`. Default: none."),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Score only the rows that `tune` held out of this table.")
    ] = False,
    kind: Kind = None,
    text: Text = None,
    label: Label = None,
    max_length: MaxLength = None,
    as_json: AsJson = False,
) -> None:
    """Score a tuned model, or a model with an adapter, on your data or on a task's held-out data.

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`.

    Example: `spectralbasis evaluate minilm adapter --test test.csv`

    Example: `spectralbasis evaluate minilm adapter --task RTE --data path/to/glue`
    """
    _one_of("--task", task, "--test", test)
    require_extra("tune", "the command evaluate")
    from spectralbasis.training import evaluate as run

    result = run(
        model,
        adapter,
        task=task,
        data=data,
        test=test,
        held_out=held_out,
        kind=kind,
        text=text or (),
        label=label,
        max_length=max_length,
        progress=shows_progress(),
    )
    tables.show_result(result.to_dict(), tables.scores_table, as_json)


def predict(
    model: Model,
    adapter_and_input: Annotated[
        list[str],
        typer.Argument(metavar="[ADAPTER] INPUT", help="Adapter folder over the model, and the rows to predict."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="File to write: .csv, .tsv, .jsonl or .parquet. Default: stdout."
        ),
    ] = None,
    text: Text = None,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens that are written at most, where text is predicted.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Predict each row of a table: a label with probabilities, a value or a text, beside the columns of the table.

    Needs the extra `tune`: `pip install 'spectralbasis[tune]'`. A table of any length takes constant memory, and the
    file gets its name when it is complete.

    Example: `spectralbasis predict minilm adapter new.csv -o predicted.csv`

    Example: `spectralbasis predict path/to/tuned-model new.jsonl -o predicted.parquet`
    """
    require_extra("tune", "the command predict")
    from spectralbasis.training.predicting import predict_file as run

    if len(adapter_and_input) > 2:
        raise typer.BadParameter(f"expected MODEL [ADAPTER] INPUT, got {len(adapter_and_input) + 1} names")
    if as_json and output is None:
        raise typer.BadParameter("--json describes the file that -o names; name one")
    *adapter, source = adapter_and_input
    with stopped_by_hand("nothing was written: run the same command again"):
        result = run(
            model,
            adapter[0] if adapter else None,
            source,
            output,
            text=text or (),
            max_length=max_length,
            batch_size=batch_size,
            new_tokens=new_tokens,
            overwrite=overwrite,
            progress=shows_progress(),
        )
    if output is not None:
        tables.show_result(result.to_dict(), tables.predictions_table, as_json)


def study(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|all|quick", help="An experiment; all; or quick (all of them, in a short time)."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the study; a study in it is continued.")],
    preset: Annotated[str, typer.Option(metavar="cpu|paper|quick", help="Size of the models, data and seeds.")] = "cpu",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the data sets, each in its own folder. Default: none.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time, each in its own process.")] = 1,
    ray: Ray = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed runs again.")] = False,
    analyse_only: Annotated[
        bool, typer.Option("--analyse", help="Start no runs; only analyse those that are finished.")
    ] = False,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Run the experiments that test the claims, with their controls, and write what they show.

    Needs the extra `study`: `pip install 'spectralbasis[study]'`. Each run is done once: stop the study at any time and
    give the same command again. Three arms of glue need the extra `baselines`, in an environment with transformers
    4.57; elsewhere their runs fail with that reason, and the others continue.

    Example: `spectralbasis study all --preset cpu --data path/to/data -o study --jobs 2`
    """
    require_extra("study", "the study")
    from spectralbasis.study.conduct import study as run

    with stopped_by_hand("finished runs are kept: run the same command again to continue"):
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
