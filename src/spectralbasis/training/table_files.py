"""Tables of a user's own: CSV, TSV, JSON lines, Parquet, plain text, data sets of Hugging Face, folders of pictures.

A `Table` yields its rows one after another, each with its number, so that a file of any size takes constant memory and
a message names the row. Texts stay as they are in the file: no word, such as NA, stands for an absent value.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralbasis.checkpoints.weight_files import inside
from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.locations import is_hub_id
from spectralbasis.printable import shortened
from spectralbasis.records import parse_json, read_record
from spectralbasis.training.data_files import first_line

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SEPARATORS = (",", ";", "\t", "|")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
KNOWN = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test",
}  # fmt: skip
"""How folders and files call a split → its name here."""
FILE = "file"
"""Column of a picture's path in its folder."""
LONGEST_FIELD = 1 << 24
"""Characters of one field: a longer one comes of a quotation mark that is not closed."""
ROWS = 1024
"""Rows that are read from Parquet files and data sets at once."""
_CONFIG = re.compile(r"\w[\w.-]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Rows = Iterator[tuple[int, list[Any]]]


@dataclass(frozen=True)
class Table:
    """A table of which rows are read one after another, anew each time.

    Args:
        place: file, folder or hub id, as messages name it.
        columns: names, in order; a name may be there twice.
        read: yields each row's number in the file, from 1, and its values in the order of the columns.
        unit: what numbers count, `line` or `row`.
        identity: changes when the content does; empty where that is not known.
        separator: of a file of separated values.
        schema: of a Parquet file, which a file of predictions continues.
        images: columns of pictures, or of their paths.
        notes: sentences about how the file was read, where that was not certain.
    """

    place: str
    columns: tuple[str, ...]
    read: Callable[[], Rows]
    unit: str = "row"
    identity: str = ""
    separator: str = ","
    schema: "pa.Schema | None" = None
    images: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def position(self, column: str) -> int:
        """Where the column stands among the columns.

        Raises:
            InputError: it is not there, or twice.
        """
        if self.columns.count(column) != 1:
            name = shortened(repr(column))
            found = f"the column {name} twice or more, expected it once"
            raise InputError(
                f"{self.place} has {found if column in self.columns else f'no column {name}'}; its columns are "
                f"{self.named()}"
            )
        return self.columns.index(column)

    def named(self) -> str:
        """The names of the columns as a list for people."""
        return shortened(", ".join(repr(column) for column in self.columns) or "none")

    def at(self, number: int, column: str | None = None) -> str:
        """A place in the table, as messages name it."""
        return f"{self.place}, {self.unit} {number}" + ("" if column is None else f", column {column!r}")


def open_tables(source: str | Path) -> dict[str, Table]:
    """The tables of a file, a folder or a data set, by split; a single file is the split `""`.

    Args:
        source: a CSV, TSV, JSON lines, Parquet or text file; a folder with files such as train.csv and test.csv; a
            data set that `save_to_disk` wrote or that lies as the hub has it; a folder of pictures, one folder for each
            class; or the hub id of a data set, which is downloaded. Where a folder or id holds several data sets, the
            name of one follows after a colon.

    Raises:
        InputError: there is nothing of this kind, or it cannot be read.
    """
    require_extra("tune", "reading tables")
    path = Path(source)
    if path.is_file():
        return {"": open_file(path)}
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        raise InputError(f"{source} is neither a file nor a folder; give a table, such as train.csv")
    place, _, config = str(source).rpartition(":")  # `place` is empty where there is no colon
    if place and _CONFIG.fullmatch(config) and (Path(place).is_dir() or is_hub_id(place)):
        return _load_dataset(place, config)
    if not is_hub_id(str(source)) or str(source).lower().endswith(KNOWN):
        raise InputError(f"the data {source} do not exist; give a file, a folder or the hub id of a data set")
    return _load_dataset(str(source))


def open_file(file: Path) -> Table:
    """The table in a file, by its suffix.

    Raises:
        InputError: the suffix is not known, or the file is empty or cannot be read.
    """
    suffix = file.suffix.lower()
    if suffix not in KNOWN:
        excel = "; save an Excel sheet as 'CSV UTF-8'" if suffix in (".xls", ".xlsx", ".ods") else ""
        raise InputError(f"{file} ends in {suffix or 'no suffix'}, expected one of {', '.join(KNOWN)}{excel}")
    if not file.stat().st_size:
        raise InputError(f"{file} is empty; expected a table with at least one row")
    if suffix == ".parquet":
        return _open_parquet(file)
    encoding = _encoding(file)
    if suffix == ".txt":
        return Table(
            str(file), ("text",), lambda: _text_rows(file, encoding), unit="line", identity=identity_of([file])
        )
    if suffix in (".csv", ".tsv"):
        return _open_separated(file, encoding)
    return _open_json(file, encoding)


def identity_of(files: Sequence[Path]) -> str:
    """What changes when one of the files is written again: paths, sizes and times."""
    return json.dumps([(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _encoding(file: Path) -> str:
    with file.open("rb") as opened:
        start = opened.read(4)
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _lines(file: Path, encoding: str, newline: str | None = "") -> Iterator[str]:
    """The lines of a file.

    Raises:
        InputError: its bytes are not text of the encoding, it holds NUL, or it cannot be read.
    """
    try:
        with file.open(encoding=encoding, newline=newline) as opened:
            number = 0
            while line := opened.readline(LONGEST_FIELD):
                number += 1
                if len(line) == LONGEST_FIELD:
                    raise InputError(f"{file}, line {number} has more than {LONGEST_FIELD:,} characters; shorten it")
                if "\0" in line:
                    raise InputError(f"{file}, line {number} holds the character NUL; save the file as UTF-8 text")
                yield line
    except UnicodeError as error:
        raise InputError(
            f"{file}, line {_undecodable(file)} is not {encoding.upper().removesuffix('-SIG')} text "
            f"({first_line(error)}); save the file as UTF-8, in Excel as 'CSV UTF-8'"
        ) from error
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _undecodable(file: Path) -> int:
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):  # noqa: B007
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
    return number


def _text_rows(file: Path, encoding: str) -> Rows:
    for number, line in enumerate(_lines(file, encoding, newline=None), 1):
        if line.strip():
            yield number, [line.rstrip("\n")]


def _open_separated(file: Path, encoding: str) -> Table:
    lines = filter(str.strip, _lines(file, encoding))
    first = next(lines, "")
    told = re.fullmatch(r"sep=(.)\s*", first)  # Excel's own way to say it
    head = next(lines, "") if told else first
    separator, quotes, notes = ("\t" if file.suffix.lower() == ".tsv" else ","), True, []
    if told:
        separator = told[1]
    elif file.suffix.lower() == ".csv":
        separator = max(SEPARATORS, key=lambda one: (len(_record(head, one)), one == ","))
        if separator != ",":
            notes.append(f"{file} is read with {separator!r} between columns.")
    if separator == "\t" and file.suffix.lower() == ".tsv":
        quotes = _quotes_fields(file, encoding)
        if not quotes:
            notes.append(f"{file} is read with quotation marks as part of the texts.")
    rows = _separated(file, encoding, separator, quotes, 1 if told else 0)
    header = next(rows, (0, []))[1]
    columns = tuple(name.strip() for name in header)
    if not any(columns):
        raise InputError(f"{file} has no header; write the names of the columns into its first line")
    if next(rows, None) is None:
        raise InputError(f"{file} has a header ({shortened(', '.join(columns))}) and no rows; expected one or more")

    def read() -> Rows:
        found = _separated(file, encoding, separator, quotes, 1 if told else 0)
        next(found)
        for number, values in found:
            if len(values) != len(columns):
                width = "1 column" if len(values) == 1 else f"{len(values)} columns"
                raise InputError(
                    f"{file}, line {number} has {width} where the header has {len(columns)} "
                    f"({shortened(', '.join(columns))}); put a text that holds {separator!r} or a line break into "
                    "quotation marks, or correct the row"
                )
            yield number, values

    return Table(
        str(file), columns, read, unit="line", identity=identity_of([file]), separator=separator, notes=tuple(notes)
    )


def _record(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def _separated(file: Path, encoding: str, separator: str, quotes: bool, skip: int) -> Rows:
    """The line on which each record begins, and its fields; rows without a value are left out."""
    lines = _lines(file, encoding)
    for _ in range(skip):
        next(lines)
    quoting: Any = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=separator, strict=True, quoting=quoting)
    while True:
        number = reader.line_num + skip + 1
        before = csv.field_size_limit(LONGEST_FIELD)
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{file}, the row that begins in line {number} cannot be read ({error}); a quotation mark in it opens "
                "a text and is not closed, or stands inside a quoted text, where it must be doubled"
            ) from error
        finally:
            csv.field_size_limit(before)
        if any(one.strip() for one in record):
            yield number, record


def _quotes_fields(file: Path, encoding: str) -> bool:
    """Whether each field that begins with a quotation mark is a quoted one; in many TSV files quotes are text."""
    quoted = re.compile(r'"(?:[^"]|"")*"')
    return all(
        quoted.fullmatch(one) is not None
        for line in _lines(file, encoding)
        if '"' in line
        for one in line.rstrip("\r\n").split("\t")
        if one.startswith('"')
    )


def _open_json(file: Path, encoding: str) -> Table:
    def objects() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(_lines(file, encoding, newline=None), 1):
            if not line.strip():
                continue
            if number == 1 and line.lstrip().startswith("["):
                raise InputError(f"{file} is one JSON list; write one object a line (JSON lines)")
            found = parse_json(line, f"{file}, line {number}", "write one JSON object a line")
            if not isinstance(found, dict):
                raise InputError(f"{file}, line {number} is a {type(found).__name__}, expected a JSON object")
            if _SURROGATE.search(line) is not None:
                try:
                    json.dumps(found, ensure_ascii=False).encode()
                except UnicodeEncodeError as error:
                    raise InputError(f"{file}, line {number} holds half a character (\\ud…); remove it") from error
            yield number, found

    columns: dict[str, None] = {}
    for count, (_, one) in enumerate(objects()):
        columns.update(dict.fromkeys(one))
        if count == ROWS:
            break
    if not columns:
        raise InputError(f"{file} has no rows with values; expected one JSON object a line")

    def read() -> Rows:
        for number, one in objects():
            unknown = [name for name in one if name not in columns]
            if unknown:
                raise InputError(
                    f"{file}, line {number} has the key {shortened(repr(unknown[0]))}, which the first {ROWS} rows "
                    f"lack; their keys are {shortened(', '.join(columns))}"
                )
            yield number, [one.get(name) for name in columns]

    return Table(str(file), tuple(columns), read, unit="line", identity=identity_of([file]))


def _open_parquet(file: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def opened() -> Any:
        try:
            return pq.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file} cannot be read as a Parquet file: {first_line(error)}") from error

    with opened() as stored:
        schema, rows = stored.schema_arrow, stored.metadata.num_rows
    if not rows:
        raise InputError(f"{file} has the columns {', '.join(schema.names)} and no rows; expected at least one row")

    def read() -> Rows:
        number = 0
        with opened() as stored:
            try:
                for batch in stored.iter_batches(batch_size=ROWS):
                    for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                        number += 1
                        yield number, list(values)
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{file} cannot be read after row {number}: {first_line(error)}") from error

    return Table(str(file), tuple(schema.names), read, identity=identity_of([file]), schema=schema)


def _open_folder(folder: Path) -> dict[str, Table]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved_dataset(folder)
    files = {
        SPLITS[path.stem.lower()]: path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in KNOWN and path.stem.lower() in SPLITS
    }
    if files:
        return {split: open_file(path) for split, path in files.items()}
    parts = {
        SPLITS[part.name.lower()]: part
        for part in sorted(folder.iterdir())
        if part.is_dir() and part.name.lower() in SPLITS and has_pictures(part)
    }
    if parts:
        return {split: picture_table(part) for split, part in parts.items()}
    if has_pictures(folder):
        return {"": picture_table(folder)}
    return _load_dataset(str(folder))


def pictures_of(folder: Path) -> list[Path]:
    """The pictures in a folder and in its folders, by name."""
    return sorted(
        path
        for path in chain(folder.iterdir(), *(part.iterdir() for part in folder.iterdir() if part.is_dir()))
        if path.suffix.lower() in PICTURES and path.is_file()
    )


def has_pictures(folder: Path) -> bool:
    """Whether a folder or one of its folders holds a picture."""
    return bool(pictures_of(folder))


def picture_table(folder: Path) -> Table:
    """The pictures of a folder as a table of `file`, `image` (its path) and, where they lie in folders, `label`."""
    pictures = pictures_of(folder)
    labelled = all(path.parent != folder for path in pictures)
    if not labelled and any(path.parent != folder for path in pictures):
        loose = next(path for path in pictures if path.parent == folder)
        raise InputError(f"{loose} lies beside folders of pictures; put it into the folder of its class")

    def read() -> Rows:
        for number, path in enumerate(pictures, 1):
            label = [path.parent.name] if labelled else []
            yield number, [path.relative_to(folder).as_posix(), str(path), *label]

    columns = (FILE, "image", *(["label"] if labelled else []))
    return Table(str(folder), columns, read, unit="picture", identity=identity_of(pictures), images=("image",))


def _saved_dataset(folder: Path) -> dict[str, Table]:
    """What `save_to_disk` wrote; the files that it names must be in the folder."""
    import datasets

    parts = [path.parent for path in (folder / "state.json", *folder.glob("*/state.json")) if path.is_file()]
    for part in parts:
        for one in read_record(part / "state.json", dict[str, Any]).get("_data_files") or ():
            inside(part, str(one.get("filename")) if isinstance(one, dict) else str(one), part / "state.json")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # of all kinds
        raise InputError(f"the data set in {folder} cannot be read: {first_line(error)}; save it again") from error
    return _tables_of(str(folder), found)


def _load_dataset(place: str, config: str | None = None) -> dict[str, Table]:
    import datasets

    try:
        found = datasets.load_dataset(place, config)
    except Exception as error:  # of all kinds
        names = _configs(place)
        if len(names) > 1 and config not in names:
            shown = shortened(", ".join(names))
            raise InputError(
                f"{place} holds {len(names)} data sets ({shown}); name one after a colon: {place}:{names[0]}"
            ) from error
        raise InputError(
            f"{place} cannot be read as a data set ({first_line(error)}); give a folder with train.csv, pictures in "
            "one folder for each class, a saved data set, or a hub id while online"
        ) from error
    return _tables_of(place if config is None else f"{place}:{config}", found)


def _configs(place: str) -> list[str]:
    """The names of the data sets that a folder or a hub id holds; none where that cannot be found out."""
    import datasets

    try:
        return list(datasets.get_dataset_config_names(place))
    except Exception:  # of all kinds: the reason is said where the data set is loaded
        return []


def _tables_of(place: str, found: Any) -> dict[str, Table]:
    splits = found if isinstance(found, dict) else {"": found}
    tables = {SPLITS.get(name, name): dataset_table(place, name, rows) for name, rows in splits.items()}
    if not tables:
        raise InputError(f"{place} holds no rows; expected at least one")
    return tables


def dataset_table(place: str, split: str, rows: "Dataset") -> Table:
    """A data set of Hugging Face as a table; numbers of classes become their names."""
    from datasets import ClassLabel, Image

    images = tuple(name for name, one in rows.features.items() if isinstance(one, Image))
    named = {name: one for name, one in rows.features.items() if isinstance(one, ClassLabel)}
    where = f"{place} ({split})" if split else place
    if not len(rows):
        raise InputError(f"{where} has no rows; expected at least one")

    def read() -> Rows:
        plain = rows.with_format(None)
        for start in range(0, len(plain), ROWS):
            columns = plain[start : start + ROWS]
            for name, classes in named.items():
                columns[name] = [_class_name(classes, number) for number in columns[name]]
            for offset, values in enumerate(zip(*(columns[name] for name in rows.column_names), strict=True)):
                yield start + offset + 1, list(values)

    return Table(where, tuple(rows.column_names), read, identity=f"{where}: {rows._fingerprint}", images=images)


def _class_name(classes: Any, number: int | None) -> str | None:
    return classes.names[number] if number is not None and 0 <= number < len(classes.names) else None
