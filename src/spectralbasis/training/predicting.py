"""Predictions for the rows of a table, one batch after another: labels and probabilities, values, or text."""

import csv
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.files import atomic_path, check_output_file
from spectralbasis.locations import check_folders
from spectralbasis.printable import printable, track
from spectralbasis.training.collators import CausalCollator
from spectralbasis.training.data_files import first_line
from spectralbasis.training.evaluation import attach_adapter, layout_of, length_for
from spectralbasis.training.models import LoadedModel, load_model, writes_text
from spectralbasis.training.outcomes import stored
from spectralbasis.training.own_tasks import Wanted, inputs_of, only, rows_of
from spectralbasis.training.row_values import Blanks
from spectralbasis.training.table_files import Table, open_tables, picture_table, pictures_of
from spectralbasis.training.tasks import IMAGE, LABEL, LIKELIHOOD_METRICS, Layout, Task

if TYPE_CHECKING:
    import pyarrow as pa

LOGGER = logging.getLogger(__name__)
BATCH_SIZE = 64
CHUNK = 16
"""Batches that are read at once, so that texts of like length share a batch."""
MOST_CLASSES = 20
"""Up to so many classes each have a column of their probability."""
NEW_TOKENS = 64
OUTPUTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
PREDICTION, PROBABILITY = "prediction", "probability"


@dataclass(frozen=True)
class PredictResult:
    """What `predict_file` wrote: the file, its number of rows, and the seconds that it took."""

    model: str
    adapter: str | None
    input: str
    output: str
    rows: int
    seconds: float
    columns: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**vars(self), "columns": list(self.columns)}


@dataclass(frozen=True)
class Predictor:
    """A model that predicts the rows of tables of one layout.

    Args:
        model: with its adapter, if it has one.
        loaded: the model with its collator.
        layout: of the tables.
        batch_size: rows at once.
        new_tokens: tokens that are written at most (running text and instructions).
    """

    model: nn.Module
    loaded: LoadedModel
    layout: Layout
    batch_size: int = BATCH_SIZE
    new_tokens: int = NEW_TOKENS

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that predictions add to a table."""
        if self.loaded.task.kind != "classification":
            return (PREDICTION,)
        names = self.layout.label_names
        own = [f"{PROBABILITY}_{name}" for name in names] if len(names) <= MOST_CLASSES else []
        return (PREDICTION, PROBABILITY, *own)

    def __call__(self, table: Table) -> Iterator[tuple[list[Any], list[Any]]]:
        """The values and the predictions of each row of a table, in its order; a few batches are in memory at a time.

        A row without text has predictions of None.

        Raises:
            InputError: a column is absent, or a row cannot be read.
        """
        blanks, count = Blanks(table), 0
        rows = rows_of(table, self.layout, blanks)
        while chunk := list(islice(rows, self.batch_size * CHUNK)):
            count += len(chunk)
            inputs = {at: one for at, (_, _, one) in enumerate(chunk) if one is not None}
            order = sorted(inputs, key=lambda at: _size(inputs[at]))
            found: dict[int, list[Any]] = {}
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                predictions = self.predictions([inputs[at] for at in batch])
                found.update(zip(batch, predictions, strict=True))
            for at, (_, values, _) in enumerate(chunk):
                yield values, found.get(at, [None] * len(self.columns))
        if blanks.count:
            LOGGER.info(
                "%s: the text is empty; %s of %s rows have no text, and no prediction.",
                blanks.first, f"{blanks.count:,}", f"{count:,}",
            )  # fmt: skip

    @torch.inference_mode()
    def predictions(self, rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """The values of `columns` for each of some rows."""
        if self.model.training:
            self.model.eval()
        device = next(self.model.parameters()).device
        if isinstance(self.loaded.collator, CausalCollator):
            return [[text] for text in self._written(rows, self.loaded.collator, device)]
        opened = [{**_opened(row), LABEL: 0} for row in rows]
        batch = {name: tensor.to(device) for name, tensor in self.loaded.collator(opened).items() if name != "labels"}
        logits = self.model(**batch).logits.float()
        if self.loaded.task.kind == "regression":
            values = logits[:, 0].double() * self.layout.scale + self.layout.center
            return [[_short(value)] for value in values.tolist()]
        shares = logits.softmax(1)
        best = shares.argmax(1).tolist()
        names = self.layout.label_names
        return [
            [names[at], share[at], *(share if len(names) <= MOST_CLASSES else ())]
            for at, share in zip(best, [[_short(one) for one in row] for row in shares.tolist()], strict=True)
        ]

    def _written(self, rows: Sequence[Mapping[str, Any]], collator: CausalCollator, device: torch.device) -> list[str]:
        """What the model writes after each row, by the likeliest token each time."""
        tokenizer = collator.tokenizer
        limit = getattr(self.loaded.model.config, "max_position_embeddings", None)
        room = limit - self.new_tokens if isinstance(limit, int) and limit > 0 else collator.max_length
        if room < 1:
            raise InputError(
                f"{self.loaded.source} reads {limit} tokens, so it cannot write {self.new_tokens} after a prompt; pass "
                f"at most {limit - 1 if limit else 1} new tokens"
            )
        prompts = [collator.prompt(row)[-room:] for row in rows]
        if not all(prompts):
            raise InputError("a prompt has no tokens, and this tokenizer has no token to begin with; write a prompt")
        longest = max(map(len, prompts))
        padding = tokenizer.pad_token_id
        ids = torch.tensor([[padding] * (longest - len(one)) + one for one in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
        made: Any = self.model
        written = made.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=self.new_tokens, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, pad_token_id=padding, eos_token_id=self._ends(tokenizer),
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]

    def _ends(self, tokenizer: Any) -> list[int] | None:
        """The tokens after which an answer ends: the tokenizer's, and those of the model's own settings."""
        settings = getattr(self.loaded.model, "generation_config", None)
        own = getattr(settings, "eos_token_id", None)
        found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        return sorted(found) or None


def _short(value: float) -> float:
    """A number of single precision, with the digits that it has."""
    return float(f"{value:.7g}")


def _size(inputs: Mapping[str, Any]) -> int:
    return sum(len(value) for value in inputs.values() if isinstance(value, str))


def _opened(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its picture open, where it has one by its path."""
    path = row.get(IMAGE)
    if not isinstance(path, str):
        return row
    from PIL import Image

    with Image.open(path) as image:
        return {**row, IMAGE: image.convert("RGB")}


def open_predictor(
    model: str | Path,
    adapter: str | Path | None,
    table: str | Path | Table,
    *,
    wanted: Wanted = Wanted(),  # noqa: B008
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    new_tokens: int = NEW_TOKENS,
) -> Predictor:
    """A model with its adapter, ready to predict the rows of a table.

    Raises:
        InputError: the model or the adapter cannot be used, or does not say what its outputs mean.
        BaseMismatchError: the adapter was trained on another base.
    """
    for name, value in (("batch_size", batch_size), ("new_tokens", new_tokens)):
        if not 1 <= value <= 1 << 20:
            raise InputError(f"{name} must be from 1 to {1 << 20}, got {value}")
    check_folders([Path(adapter) if adapter else None])
    tuned = Path(adapter or model)
    record = stored(tuned)
    layout = layout_of(model, record, wanted, table, labelled=False)
    kept = record.get("settings", {}).get("max_length") if max_length is None else max_length
    causal = writes_text(model)
    if layout.kind == "language" and not causal:
        raise InputError(f"{model} fills in hidden words, which is nothing to predict of a text; tune it to labels")
    task = _empty_task(layout, causal)
    length = length_for(model, task.kind, kept if isinstance(kept, int) else None)
    loaded = load_model(model, task, head="fresh" if adapter else "stored", max_length=length)
    predicts = attach_adapter(loaded, tuned) if adapter else loaded.model
    if torch.cuda.is_available():
        predicts.to("cuda")
    return Predictor(predicts, loaded, layout, batch_size, new_tokens)


def _empty_task(layout: Layout, causal: bool) -> Task:
    from datasets import Dataset

    kinds: dict[str, Any] = {"images": "classification", "language": "causal_language"}
    kind = kinds.get(layout.kind, layout.kind)
    metrics = LIKELIHOOD_METRICS if kind in ("causal_language", "instructions") else ("accuracy",)
    return Task(
        name="predictions",
        modality="image" if layout.kind == "images" else "text",
        kind=kind,
        inputs=inputs_of(layout),
        label_names=layout.label_names,
        train=Dataset.from_dict({}),
        evaluation=Dataset.from_dict({}),
        metrics=metrics,
        headline=metrics[0],
        layout=layout,
    )


def predict(
    model: str | Path,
    adapter: str | Path | None,
    rows: Iterable[str | Mapping[str, Any]] | str | Path,
    *,
    text: str | Sequence[str] = (),
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[dict[str, Any]]:
    """Predict rows one after another, in their order; a few batches are in memory at a time.

    Args:
        model: a folder, a hub id or `minilm`; a fully tuned model, or the base of the adapter.
        adapter: folder of an adapter that `tune` or PEFT wrote; None predicts with the model's own head.
        rows: texts, or mappings from column to value, or the path of a table; see `tune`.
        text: columns of text; by default those of the tuning.
        max_length: tokens at which texts are cut; None takes that of the tuning.
        batch_size: rows at once.
        new_tokens: tokens that are written at most (running text and instructions).

    Returns:
        Each row with further columns: `prediction` (a label, a value or a text), and for classes `probability` (of the
        label, in [0, 1]) and, up to 20 classes, `probability_NAME` of each. They are None for a row without text.

    Raises:
        InputError: the model, the adapter, a column or a row cannot be used, or the extra `tune` is not installed.
        BaseMismatchError: the adapter was trained on another base.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from spectralbasis.training import tune
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> folder = Path(tempfile.mkdtemp())
        >>> for number in range(8):
        ...     place = folder / "pictures" / ("dark", "bright")[number % 2]
        ...     place.mkdir(parents=True, exist_ok=True)
        ...     Image.new("L", (8, 8), 255 * (number % 2)).save(place / f"{number}.png")
        >>> base = save_untrained(folder / "vit")
        >>> tuned = tune(base, train=folder / "pictures", output=folder / "adapter", leading=4, steps=2, progress=False)
        >>> first = next(predict(base, folder / "adapter", folder / "pictures"))
        >>> first["file"], first["prediction"] in ("dark", "bright"), sorted(first)[3:]
        ('bright/1.png', True, ['prediction', 'probability', 'probability_bright', 'probability_dark'])
    """
    require_extra("tune", "spectralbasis.predict")
    table = _input_table(rows) if isinstance(rows, str | Path) else None
    if table is None:
        rows = iter(rows)  # type: ignore[arg-type]
        first = next(rows, None)
        if first is None:
            return iter(())
        table = _table_in_memory(first, rows, _columns_of_text(Path(adapter or model)))
    wanted = Wanted(None, (text,) if isinstance(text, str) else tuple(text))
    predictor = open_predictor(
        model, adapter, table, wanted=wanted, max_length=max_length, batch_size=batch_size, new_tokens=new_tokens
    )
    columns = output_columns(table, predictor)
    return (dict(zip(columns, [*values, *predictions], strict=True)) for values, predictions in predictor(table))


def _columns_of_text(tuned: Path) -> tuple[str, ...]:
    return tuple(stored(tuned).get("layout", {}).get("text", ("text",)))[:1]


def _table_in_memory(first: Any, rest: Iterator[Any], text: Sequence[str]) -> Table:
    """Rows as a table that can be read once; a text alone is the only column."""
    columns = tuple(first) if isinstance(first, Mapping) else tuple(text)

    def read() -> Iterator[tuple[int, list[Any]]]:
        number = 0
        row = first
        while row is not None:
            number += 1
            if isinstance(row, Mapping):
                if set(row) != set(columns):
                    raise InputError(f"row {number} has the columns {', '.join(row)}, and row 1 {', '.join(columns)}")
                yield number, [row[name] for name in columns]
            else:
                yield number, [row]
            row = next(rest, None)

    return Table("the rows", columns, read)


def _input_table(source: str | Path) -> Table:
    path = Path(source)
    if path.is_dir() and any(one.parent == path for one in pictures_of(path)):
        return picture_table(path)
    tables = open_tables(source)
    return tables.get("test") or only(tables, "test", source)


def output_columns(table: Table, predictor: Predictor) -> tuple[str, ...]:
    """The columns of a table with those of the predictions.

    Raises:
        InputError: the table has one of them already.
    """
    for column in predictor.columns:
        if column in table.columns:
            raise InputError(
                f"{table.place} has a column {column!r} already, which the predictions need; rename or remove it"
            )
    return (*table.columns, *predictor.columns)


def predict_file(
    model: str | Path,
    adapter: str | Path | None,
    source: str | Path,
    output: str | Path | None = None,
    *,
    text: str | Sequence[str] = (),
    max_length: int | None = None,
    batch_size: int = BATCH_SIZE,
    new_tokens: int = NEW_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> PredictResult:
    """Predict the rows of a table into a file, which has the table's columns and those of `predict`.

    A table of any length takes constant memory. The file gets its name when it is complete.

    Args:
        model: see `predict`.
        adapter: see `predict`.
        source: a table or a folder of pictures; see `tune`.
        output: a file whose suffix says its format: .csv, .tsv, .jsonl or .parquet; None writes to stdout, as JSON
            lines where the input is such a file, else as CSV.
        text: see `predict`.
        max_length: see `predict`.
        batch_size: see `predict`.
        new_tokens: see `predict`.
        overwrite: replace the output file.
        progress: draw a bar on stderr.

    Raises:
        InputError: see `predict`, or the output cannot be written.
        BaseMismatchError: the adapter was trained on another base.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from spectralbasis.training import tune
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> folder = Path(tempfile.mkdtemp())
        >>> for number in range(8):
        ...     place = folder / "pictures" / ("dark", "bright")[number % 2]
        ...     place.mkdir(parents=True, exist_ok=True)
        ...     Image.new("L", (8, 8), 255 * (number % 2)).save(place / f"{number}.png")
        >>> base = save_untrained(folder / "vit")
        >>> tuned = tune(base, train=folder / "pictures", output=folder / "adapter", leading=4, steps=2, progress=False)
        >>> file = folder / "predicted.csv"
        >>> result = predict_file(base, folder / "adapter", folder / "pictures", file, progress=False)
        >>> result.rows, file.read_text().splitlines()[0]
        (8, 'file,label,prediction,probability,probability_bright,probability_dark')
    """
    require_extra("tune", "spectralbasis.predict")
    started = time.perf_counter()
    if output is not None:
        _check_output(Path(output), source, overwrite)
    table = _input_table(source)
    wanted = Wanted(None, (text,) if isinstance(text, str) else tuple(text))
    predictor = open_predictor(
        model, adapter, table, wanted=wanted, max_length=max_length, batch_size=batch_size, new_tokens=new_tokens
    )
    columns = output_columns(table, predictor)
    for sentence in table.notes:
        LOGGER.info(sentence)
    kept = [at for at, column in enumerate(columns) if column not in table.images]
    shown = tuple(columns[at] for at in kept)
    suffix = Path(output).suffix.lower() if output is not None else Path(table.place).suffix.lower()
    count = 0
    with _writer(output, suffix, shown, table, predictor) as write:
        for values, predictions in track(
            predictor(table), "predicting", total=_count(table) if progress else 0, enabled=progress
        ):
            row = [*values, *predictions]
            write([row[at] for at in kept])
            count += 1
    return PredictResult(
        str(model), str(adapter) if adapter else None, str(source), str(output) if output else "stdout", count,
        time.perf_counter() - started, shown,
    )  # fmt: skip


def _count(table: Table) -> int:
    """The number of rows, for a bar: the table is read once more."""
    return sum(1 for _ in table.read())


def _check_output(output: Path, source: str | Path, overwrite: bool) -> None:
    suffix = output.suffix.lower()
    if suffix not in OUTPUTS:
        raise InputError(f"the output {output} ends in {suffix or 'no suffix'}, expected one of {', '.join(OUTPUTS)}")
    check_output_file(output)
    if output.exists():
        if Path(source).exists() and output.samefile(source):
            raise InputError(f"the output {output} is the input itself; name another file")
        if not overwrite:
            raise InputError(f"the output {output} exists; name a new file, or add --overwrite to replace it")


class _Write(Protocol):
    def __call__(self, row: list[Any]) -> None: ...


@contextmanager
def _writer(
    output: str | Path | None, suffix: str, columns: tuple[str, ...], table: Table, predictor: Predictor
) -> Iterator[_Write]:
    """A function that writes one row; the file gets its name when all are written."""
    if output is None:
        yield _text_writer(_Shown(sys.stdout) if sys.stdout.isatty() else sys.stdout, suffix, columns, table)
        return
    with atomic_path(Path(output)) as temporary:
        if suffix == ".parquet":
            with _ParquetRows(temporary, columns, table, predictor) as rows:
                yield rows.add
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                yield _text_writer(file, suffix, columns, table)


class _Shown:
    """A terminal, to which characters that it would act on are written as escapes."""

    def __init__(self, terminal: IO[str]) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        """Write a text."""
        return self._terminal.write(printable(text, lines=True))


def _text_writer(file: "IO[str] | _Shown", suffix: str, columns: tuple[str, ...], table: Table) -> _Write:
    if suffix in (".jsonl", ".ndjson", ".json"):
        if len(set(columns)) < len(columns):
            raise InputError(f"{table.place} has a column twice, which JSON cannot hold; write a .csv file")

        def write_object(row: list[Any]) -> None:
            file.write(json.dumps(dict(zip(columns, map(_plain, row), strict=True)), ensure_ascii=False) + "\n")

        return write_object
    separator = "\t" if suffix == ".tsv" else table.separator if suffix == ".csv" and table.separator != "\t" else ","
    writer = csv.writer(file, delimiter=separator, lineterminator="\n")
    writer.writerow(columns)

    def write_record(row: list[Any]) -> None:
        writer.writerow([_cell(value) for value in row])

    return write_record


def _plain(value: Any) -> Any:
    """A value as JSON has it; what it has no form for becomes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else str(value)


def _cell(value: Any) -> Any:
    return json.dumps(_plain(value), ensure_ascii=False) if isinstance(value, list | dict) else value


class _ParquetRows:
    """Rows that become groups of a Parquet file; the input's columns keep their types where it is one."""

    def __init__(self, file: Path, columns: tuple[str, ...], table: Table, predictor: Predictor) -> None:
        if len(set(columns)) < len(columns):
            raise InputError(f"{table.place} has a column twice, which Parquet cannot hold; write a .csv file")
        self._file, self._columns, self._table, self._predictor = file, columns, table, predictor
        self._rows: list[list[Any]] = []
        self._schema: pa.Schema | None = None
        self._stored: Any = None

    def __enter__(self) -> "_ParquetRows":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._flush()
        if self._stored is not None:
            self._stored.close()

    def add(self, row: list[Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH_SIZE * CHUNK:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._rows:
            return
        values = [list(column) for column in zip(*self._rows, strict=True)]
        try:
            if self._schema is None:
                self._schema = self._found_schema(values)
                self._stored = pq.ParquetWriter(self._file, self._schema)
            arrays = [pa.array(column, field.type) for column, field in zip(values, self._schema, strict=True)]
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(
                f"{self._table.place} has values that a Parquet file cannot hold in one column: {first_line(error)}; "
                "write a .jsonl file"
            ) from error
        self._stored.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []

    def _found_schema(self, values: list[list[Any]]) -> "pa.Schema":
        import pyarrow as pa

        known = {field.name: field.type for field in self._table.schema} if self._table.schema is not None else {}
        number = pa.float64()
        regression = self._predictor.loaded.task.kind == "regression"
        for column in self._predictor.columns:
            known[column] = number if column != PREDICTION or regression else pa.string()
        return pa.schema(
            [
                (column, known[column] if column in known else pa.array(found).type)
                for column, found in zip(self._columns, values, strict=True)
            ]
        )
