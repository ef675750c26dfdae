"""The tables of docs/reliability.md: what was tried, what was lost, what a person was told, and where it ended."""

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import table, versions

MESSAGES, LONGEST = 2, 200
OUTCOMES = {
    "as undisturbed": "as undisturbed:",
    "refused": "refused with a sentence:",
    "other values": "unnoticed, with other values:",
}


def faults(group: str) -> Callable[[dict[str, Any]], str]:
    """The cases of one kind of fault."""

    def make(found: dict[str, Any]) -> str:
        rows = [row for row in found["rows"] if row["group"] == group]
        heads = ["what happened", "tries", "exit code", "lost", "tracebacks", "it ended", "the last line that was told"]
        return table(heads, [_row(row) for row in rows]) + "\n"

    return make


def totals(found: dict[str, Any]) -> str:
    """How many faults were tried and what they cost, as a sentence."""
    rows = found["rows"]
    tries = sum(row["trials"] for row in rows)
    lost = sum(bool(row["lost"]) for row in rows)
    shown = sum(row["tracebacks"] for row in rows)
    return (
        f"{tries} tries of {len(rows)} faults: in {lost} of the faults something finished was lost, and {shown} tries "
        f"showed a traceback or an unforeseen error. {versions(found, 'transformers', 'peft')}\n"
    )


def hostile(found: dict[str, Any]) -> str:
    """What became of files that were changed to fool their readers."""
    heads = ["file", "tries", "refused with a sentence", "as undisturbed", "read as other values", "faults", "slowest"]
    outcomes = ("refused", "as undisturbed", "other values")
    rows = [
        [
            row["name"], str(row["trials"]), *(str(row["outcomes"].get(outcome, 0)) for outcome in outcomes),
            str(row["faults"]), f"{row['slowest']:.0f} s",
        ]
        for row in found["rows"]
    ]  # fmt: skip
    tries, faults = (sum(row[count] for row in found["rows"]) for count in ("trials", "faults"))
    note = f"{tries} tries, {faults} faults. {versions(found, 'transformers', 'peft')}"
    return f"{table(heads, rows)}\n\n{note}\n"


def _row(row: dict[str, Any]) -> list[str]:
    again = "" if row["again"] is None else f", then given again{' with ' + row['again'] if row['again'] else ''}"
    ended = [f"{OUTCOMES[name]} {count}" for name, count in sorted(row["outcomes"].items())]
    told = [f"`{_short(message)}`" for message in row["told"][:MESSAGES]]
    codes = [str(code) for code in row["exit_codes"]]
    lost = "; ".join(row["lost"]) or "nothing"
    return [
        f"{row['name']}{again}", str(row["trials"]), ", ".join(codes), lost, str(row["tracebacks"]),
        ", ".join(ended), "<br>".join(told),
    ]  # fmt: skip


def _short(message: str) -> str:
    """A message as a cell of a table can hold it."""
    plain = message.replace("|", "/").replace("`", "")
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}…"
