"""Changes to files such as an attacker, another program or bad luck makes; each knows the format that it changes."""

import json
import os
import random
import re
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

CANARY = "canary-that-nobody-may-read"
"""What the files outside of a try's folder hold: found anywhere else, it was read and passed on."""
ESCAPES = "\x1b]0;owned\x07\x1b[31m\u202e"
_TYPES = ("F64", "F16", "BF16", "F8_E5M2", "I8", "U8", "BOOL", "C64", "F4")
_DEEP = "so deep that a reader may fall"
"""Stands for lists in lists in lists, which `json.dumps` could not write."""
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 10**9, -(2**63), 2**64, 10**400, 0.5, 1e308, 1e-320, float("nan"), float("inf"),
    "", "x", ".", "..", "os.system", "this", ESCAPES, "<script>alert(1)</script>", "a" * 100_000,
    "((a|[a-z.0-9_])+)+X!",
    "{{7*7}}", "\0", "\ud800", [], {}, [[]], [1], ["x"], {"x": 1}, {"": None}, list(range(2000)),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a mutation works.

    Attributes:
        file: what it changes.
        outside: a folder of canaries, which nothing in the file may lead to.
        chance: what it chooses by.
    """

    file: Path
    outside: Path
    chance: random.Random


Mutation = Callable[[Place], None]


def mutate(place: Place) -> str:
    """Change the file by one to three mutations of its format, and say which."""
    known = _mutations(place.file)
    chosen = [place.chance.choice(known) for _ in range(place.chance.choice((1, 1, 1, 2, 3)))]
    for mutation in chosen:
        mutation(place)
        if place.file.is_symlink() or not place.file.is_file() or place.file.stat().st_size > 1 << 30:
            break  # what follows would change the canary, wait for a pipe or fill the memory
    return ", ".join(mutation.__name__.strip("_").replace("_", " ") for mutation in chosen)


def _mutations(file: Path) -> list[Mutation]:
    start = file.read_bytes()[:16]
    if start.startswith(b"PK\x03\x04"):
        own: list[Mutation] = [_pack_records, _give_a_record_twice, _swap_records, _damage_a_record]
    elif start.startswith(b"SQLite format 3"):
        own = [_change_a_cell, _change_a_cell, _rename_a_column, _add_a_trigger, _put_an_endless_view]
    elif start.startswith(b"PAR1"):
        own = [_change_a_column, _change_a_column, _drop_a_column, _repeat_rows]
    elif start.startswith(b"GGUF"):
        own = [_change_a_number, _change_a_number, _change_a_count, _give_a_name_twice]
    elif start[8:9] == b"{" and file.suffix != ".json":
        own = [_change_the_header, _change_the_header, _change_metadata, _give_a_tensor_twice, _spoil_numbers]
    elif file.suffix in (".json", ".jsonl"):
        own = [_change_a_value, _change_a_value, _change_a_value, _rename_a_key, _drop_a_key, _give_a_key_twice, _nest]
    else:
        own = []
    return [*own, *own, _flip_bits, _cut, _append, _copy_a_slice, _zero_a_slice, _link_out, _make_special, _grow]


def _flip_bits(place: Place) -> None:
    content = bytearray(place.file.read_bytes())
    for _ in range(place.chance.choice((1, 8))):
        if content:
            at = place.chance.randrange(min(len(content), place.chance.choice((256, 4096, len(content)))))
            content[at] ^= 1 << place.chance.randrange(8)
    place.file.write_bytes(content)


def _cut(place: Place) -> None:
    content = place.file.read_bytes()
    place.file.write_bytes(content[: place.chance.randrange(len(content) + 1)])


def _append(place: Place) -> None:
    with place.file.open("ab") as file:
        file.write(place.chance.choice((b"\0" * 64, b"PK\x05\x06" + b"\0" * 18, b"}" * 9, os.urandom(40))))


def _copy_a_slice(place: Place) -> None:
    content = bytearray(place.file.read_bytes())
    if content:
        start, target = place.chance.randrange(len(content)), place.chance.randrange(len(content))
        length = place.chance.choice((4, 64, 1024))
        content[target : target + length] = content[start : start + length]
    place.file.write_bytes(content)


def _zero_a_slice(place: Place) -> None:
    content = bytearray(place.file.read_bytes())
    start, length = place.chance.randrange(len(content) + 1), place.chance.choice((4, 64, 1024))
    content[start : start + length] = b"\0" * len(content[start : start + length])
    place.file.write_bytes(content)


def _link_out(place: Place) -> None:
    """A link in the file's place, to a canary of the same format where there is one."""
    twins = [file for file in place.outside.iterdir() if file.suffix == place.file.suffix]
    target = place.chance.choice(twins or list(place.outside.iterdir()))
    place.file.unlink()
    place.file.symlink_to(target)


def _make_special(place: Place) -> None:
    place.file.unlink()
    kind = place.chance.choice(("pipe", "folder", "loop", "dangling"))
    if kind == "pipe":
        os.mkfifo(place.file)
    elif kind == "folder":
        place.file.mkdir()
    else:
        place.file.symlink_to(place.file.name if kind == "loop" else "nowhere")


def _grow(place: Place) -> None:
    """A terabyte that takes no room on the disk."""
    with place.file.open("ab") as file:
        file.truncate(1 << 40)


# --- GGUF -------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 9, 255, 1 << 16, 1 << 24, 1 << 31, 1 << 40, 1 << 62, (1 << 63) + 1, (1 << 64) - 1)


def _put_number(place: Place, at: int, size: int) -> None:
    content = bytearray(place.file.read_bytes())
    number = place.chance.choice(_NUMBERS) % (1 << 8 * size)
    content[at : at + size] = number.to_bytes(size, "little")
    place.file.write_bytes(content)


def _change_a_number(place: Place) -> None:
    """A length, a type, a side of a tensor or where it starts: one of the numbers of four or eight bytes."""
    _put_number(place, place.chance.randrange(4, 4096), place.chance.choice((4, 8)))


def _change_a_count(place: Place) -> None:
    """The version, how many tensors there are, or how many entries of metadata."""
    _put_number(place, *place.chance.choice(((4, 4), (8, 8), (16, 8))))


def _give_a_name_twice(place: Place) -> None:
    content = place.file.read_bytes()
    names = sorted(set(re.findall(rb"blk\.\d\.\w+\.weight|[a-z]+\.[a-z_]+\.[a-z_]+", content[:8192])))
    one, other = place.chance.choice(names), place.chance.choice(names)
    hostile = place.chance.choice((other, ESCAPES.encode(), b"\xff", b"../../secret", b"x.lora_a"))
    place.file.write_bytes(content.replace(one, hostile.ljust(len(one), b".")[: len(one)]))


# --- JSON -------------------------------------------------------------------------------------------------------


def _change_a_value(place: Place) -> None:
    _edit_json(place, lambda content: _set_somewhere(content, _value(place), place.chance))


def _rename_a_key(place: Place) -> None:
    def edit(content: Any) -> Any:
        holder = place.chance.choice(_objects(content))
        if holder:
            key = place.chance.choice(list(holder))
            holder[str(_value(place))[:200]] = holder.pop(key)
        return content

    _edit_json(place, edit)


def _drop_a_key(place: Place) -> None:
    def edit(content: Any) -> Any:
        holder = place.chance.choice(_objects(content))
        if holder:
            del holder[place.chance.choice(list(holder))]
        return content

    _edit_json(place, edit)


def _give_a_key_twice(place: Place) -> None:
    text = place.file.read_text(errors="replace")
    start = text.find("{")
    try:
        content = json.loads(text)
        key = place.chance.choice(list(content))
    except (ValueError, IndexError, TypeError, RecursionError):
        return
    place.file.write_text(f"{text[: start + 1]}{json.dumps(key)}: {_dumps(_value(place))}, {text[start + 1 :]}")


def _nest(place: Place) -> None:
    _edit_json(place, lambda content: _set_somewhere(content, _DEEP, place.chance))


def _edit_json(place: Place, edit: Callable[[Any], Any]) -> None:
    try:
        content = json.loads(place.file.read_text(errors="replace"))
    except (ValueError, RecursionError):
        return
    place.file.write_text(_dumps(edit(content)), encoding="utf-8", errors="surrogatepass")


def _dumps(content: Any) -> str:
    return json.dumps(content).replace(json.dumps(_DEEP), "[" * 60_000 + "]" * 60_000)


def _set_somewhere(content: Any, value: Any, chance: random.Random) -> Any:
    """The content with another value at one of its places; the whole is one of them."""
    places = list(_places(content))
    if not places or chance.random() < 0.03:
        return value
    holder, key = chance.choice(places)
    holder[key] = value
    return content


def _places(content: Any) -> Any:
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def _objects(content: Any) -> list[dict[str, Any]]:
    found = [content] if isinstance(content, dict) else []
    return found + [holder[key] for holder, key in _places(content) if isinstance(holder[key], dict)] or [{}]


def _value(place: Place) -> Any:
    """Something that a reader may not expect, a path to a canary among it."""
    canary = place.chance.choice(sorted(place.outside.iterdir()))
    relative = os.path.relpath(canary, place.file.parent)
    return place.chance.choice((*_VALUES, str(canary), str(canary.parent), relative, f"file://{canary}"))


# --- safetensors ------------------------------------------------------------------------------------------------


def _change_the_header(place: Place) -> None:
    """Another type, shape or extent for a tensor, or another value anywhere in the header."""

    def edit(header: dict[str, Any]) -> Any:
        names = [name for name in header if name != "__metadata__"]
        if not names or place.chance.random() < 0.3:
            return _set_somewhere(header, _value(place), place.chance)
        name = place.chance.choice(names)
        kind = place.chance.choice(("dtype", "shape", "shape", "name"))
        if kind == "name":
            header[str(_value(place))[:5000]] = header.pop(name)
        elif kind == "dtype":
            header[name]["dtype"] = place.chance.choice(
                ("F64", "F16", "BF16", "F8_E5M2", "I8", "U8", "BOOL", "C64", "F4")
            )
        else:
            shape = [*header[name]["shape"]]
            changes = (shape[::-1], [*shape, 1], [1, *shape], [], [2**62, 4], [0, 8], [-1, *shape[1:]], [2**64])
            header[name]["shape"] = place.chance.choice(changes)
        return header

    _edit_header(place, edit)


def _change_metadata(place: Place) -> None:
    """Another value in what the file says of itself; texts in it that are JSON are opened for that."""

    def edit(header: dict[str, Any]) -> Any:
        metadata = header.get("__metadata__")
        if not isinstance(metadata, dict) or not metadata:
            header["__metadata__"] = {"format": str(_value(place))[:200]}
            return header
        key = place.chance.choice(list(metadata))
        try:
            inner = _set_somewhere(json.loads(metadata[key]), _value(place), place.chance)
            metadata[key] = _dumps(inner)
        except (ValueError, TypeError, RecursionError):
            metadata[key] = _value(place)
        return header

    _edit_header(place, edit)


def _give_a_tensor_twice(place: Place) -> None:
    """A tensor's name a second time, or another name that stands for the same matrix."""

    def edit(header: dict[str, Any]) -> Any:
        names = [name for name in header if name != "__metadata__"]
        if names:
            name = place.chance.choice(names)
            spellings = (
                f"module.{name}",
                f"model.{name}",
                name.removesuffix(".weight"),
                f"{name}.weight",
                name.upper(),
            )
            header[place.chance.choice(spellings)] = header[place.chance.choice(names)]
        return header

    _edit_header(place, edit)


def _spoil_numbers(place: Place) -> None:
    """NaN, infinity or huge numbers among a tensor's."""
    content = bytearray(place.file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    if start + 4 < len(content):
        at = place.chance.randrange(start, len(content) - 3) // 4 * 4
        content[at : at + 4] = struct.pack("<f", place.chance.choice((float("nan"), float("inf"), 3e38, -1e30)))
    place.file.write_bytes(content)


def _edit_header(place: Place, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = place.file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return
    if isinstance(header, dict):
        encoded = _dumps(edit(header)).encode("utf-8", "surrogatepass")
        encoded += b" " * (-len(encoded) % 8)
        place.file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])


# --- archives ---------------------------------------------------------------------------------------------------


def _pack_records(place: Place) -> None:
    _rewrite_archive(place, lambda records: records, zipfile.ZIP_DEFLATED)


def _give_a_record_twice(place: Place) -> None:
    def edit(records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        name, content = place.chance.choice(records)
        other = bytes(len(content)) if place.chance.random() < 0.5 else place.chance.choice(records)[1]
        return [*records, (name, other)]

    _rewrite_archive(place, edit)


def _swap_records(place: Place) -> None:
    def edit(records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        names, contents = [name for name, _ in records], [content for _, content in records]
        place.chance.shuffle(contents)
        return list(zip(names, contents, strict=True))

    _rewrite_archive(place, edit)


def _damage_a_record(place: Place) -> None:
    def edit(records: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        at = place.chance.randrange(len(records))
        name, content = records[at]
        records[at] = (
            name,
            content[: place.chance.randrange(len(content) + 1)] + place.chance.choice((b"", b"\0" * 9)),
        )
        return records

    _rewrite_archive(place, edit)


def _rewrite_archive(
    place: Place,
    edit: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    try:
        with zipfile.ZipFile(place.file) as archive:
            records = [(name, archive.read(name)) for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, ValueError):
        return
    made = BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a record is given twice on purpose
        for name, content in edit(records) if records else records:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    place.file.write_bytes(made.getvalue())


# --- databases and tables ---------------------------------------------------------------------------------------


def _change_a_cell(place: Place) -> None:
    def change(database: sqlite3.Connection, table: str, columns: list[str]) -> None:
        column = place.chance.choice(columns)
        value = place.chance.choice((None, "", "x", -1, 2**62, 1e308, b"\xff\xfe", "[]", "{}", _DEEP, ESCAPES, 0.999))
        rows = [row for (row,) in database.execute(f'SELECT rowid FROM "{table}"')]
        changed = f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?'
        database.execute(changed, (value, place.chance.choice(rows)))

    _edit_database(place, change)


def _rename_a_column(place: Place) -> None:
    def change(database: sqlite3.Connection, table: str, columns: list[str]) -> None:
        database.execute(f'ALTER TABLE "{table}" RENAME COLUMN "{place.chance.choice(columns)}" TO "renamed"')

    _edit_database(place, change)


def _add_a_trigger(place: Place) -> None:
    def change(database: sqlite3.Connection, table: str, columns: list[str]) -> None:
        database.execute(f'CREATE TRIGGER t AFTER INSERT ON "{table}" BEGIN DELETE FROM "{table}"; END')

    _edit_database(place, change)


def _put_an_endless_view(place: Place) -> None:
    def change(database: sqlite3.Connection, table: str, columns: list[str]) -> None:
        database.execute(f'ALTER TABLE "{table}" RENAME TO "kept_{table}"')
        named = ", ".join(f'n AS "{column}"' for column in columns)
        endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n FROM c)"
        database.execute(f'CREATE VIEW "{table}" AS {endless} SELECT {named} FROM c')

    _edit_database(place, change)


def _edit_database(place: Place, change: Callable[[sqlite3.Connection, str, list[str]], None]) -> None:
    try:
        with closing(sqlite3.connect(place.file)) as database, database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            table = place.chance.choice(tables)
            change(database, table, [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')])
    except (sqlite3.Error, IndexError):
        return


def _change_a_column(place: Place) -> None:
    def edit(table: pd.DataFrame) -> pd.DataFrame:
        column = place.chance.choice(list(table.columns))
        value = place.chance.choice((None, "x", -1, 10**12, float("nan"), float("inf"), True, b"\xff", ESCAPES))
        if place.chance.random() < 0.5:
            return table.assign(**{column: [value] * len(table)})
        values = table[column].astype(object).tolist()
        if values:
            values[place.chance.randrange(len(values))] = value
        return table.assign(**{column: values})

    _edit_table(place, edit)


def _drop_a_column(place: Place) -> None:
    _edit_table(place, lambda table: table.drop(columns=place.chance.choice(list(table.columns))))


def _repeat_rows(place: Place) -> None:
    _edit_table(place, lambda table: pd.concat([table, table]))


def _edit_table(place: Place, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    try:
        edit(pd.read_parquet(place.file)).to_parquet(place.file)
    except (OSError, ValueError, TypeError, IndexError, OverflowError):
        return
