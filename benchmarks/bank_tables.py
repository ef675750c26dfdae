"""The tables of docs/many-tasks.md and docs/serve.md, and the bank's part of docs/performance.md."""

from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import machine, met, table, versions

COUNTS = (1, 1_000, 100_000, 1_000_000)
THROUGHPUT, MEMORY, SERVED = 0.9, 1.1, 0.8
BYTES = 4


def spectral_numbers(matrices: Sequence[Sequence[int]], k: int, head: int) -> int:
    """What a task trains: a diagonal of k in every matrix, and its head."""
    return k * len(matrices) + head


def lora_numbers(matrices: Sequence[Sequence[int]], rank: int, head: int) -> int:
    """What a task trains: two factors in every matrix, and its head."""
    return sum(rank * (m + n) for m, n in matrices) + head


def sizes(found: dict[str, Any]) -> str:
    """Bytes of many tasks, by arithmetic."""
    settings = found["settings"]
    matrices, head = settings["matrices"], settings["head"]
    each = (
        spectral_numbers(matrices, settings["k"], head),
        lora_numbers(matrices, settings["rank"], head),
    )
    heads = ["tasks", f"diagonal, k = {settings['k']}", f"LoRA, r = {settings['rank']}"]
    rows = [["numbers of a task", *(f"{numbers:,}" for numbers in each)]]
    rows += [[f"{count:,}", *(_size(count * numbers * BYTES) for numbers in each)] for count in COUNTS]
    rows += [[f"{COUNTS[-1]:,} in 16 bits", *(_size(COUNTS[-1] * numbers * BYTES // 2) for numbers in each)]]
    note = (
        f"{len(matrices)} matrices of a MiniLM, and a head of {settings['labels']} labels ({head} numbers) for each "
        "task, in float32."
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def throughput(found: dict[str, Any]) -> str:
    """Rows a second of one task and of many, ours and PEFT's LoRA."""
    settings, serving, lora = found["settings"], found["serving"], found["lora"]
    few, many = serving["tasks"]
    single = serving["seconds"]["one task, PEFT"]
    named = {
        "the base alone (an adapter merged into it)": serving["seconds"]["base"],
        "one task: an adapter in PEFT": single,
        "one task: a bank": serving["seconds"]["one task, bank"],
        f"{settings['rows']} tasks of {few:,}: a bank": serving["seconds"]["few"],
        f"{settings['rows']} tasks of {many:,}: a bank": serving["seconds"]["many"],
    }
    rows = [_throughput_row(name, seconds, single, settings["rows"]) for name, seconds in named.items()]
    of_lora = {"one task: LoRA in PEFT": "one task", f"{lora['tasks']} tasks of {lora['tasks']}: LoRA in PEFT": "mixed"}
    rows += [
        _throughput_row(name, lora["seconds"][kind], lora["seconds"]["one task"], settings["rows"])
        for name, kind in of_lora.items()
    ]
    note = (
        f"Batches of {settings['rows']} rows of {settings['length']} tokens; shares are of one task in PEFT by the "
        f"same method. Adding the {lora['tasks']} LoRA adapters took PEFT {lora['adding_seconds']:.0f} s, each "
        f"longer than the one before; a task is added to a bank in {1e3 * found['seconds_per_task_added']:.2f} ms. "
        f"{machine(found)} {versions(found, 'transformers', 'peft')}"
    )
    return f"{table(['', 'rows a second', 'share of one task', f'goal {THROUGHPUT}'], rows)}\n\n{note}\n"


def memory(found: dict[str, Any]) -> str:
    """Memory of a bank when every task of it has been used."""
    heads = ["tasks", "numbers", "file", "mapped pages", "memory of its own", "all / numbers", f"goal {MEMORY}"]
    heads += ["opened and first batch"]
    largest = max(row["tasks"] for row in found["memory"])
    rows = [_memory_row(row, asked=row["tasks"] == largest) for row in found["memory"]]
    lora = found["lora"]
    note = (
        f"What the process grows by over one that serves a bank of one task. {lora['tasks']} LoRA adapters of "
        f"r = {found['settings']['rank']} added {_size(lora['added_bytes'])}."
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def serving(found: dict[str, Any]) -> str:
    """Rows a second behind HTTP beside the bank's own."""
    if not {"bank", "served"} <= found.keys():
        return ""
    settings, own = found["settings"], found["bank"]["rows_per_second"]
    heads = ["", "rows a second", "share of the bank", f"goal {SERVED}", "median time", "99 % within"]
    rows = [["the bank in a process", f"{own:.0f}", "1.00", "", "", ""]]
    for one in found["served"]["rates"]:
        share, count = one["rows_per_second"] / own, one["rows_of_a_request"]
        times = [f"{one[key]:.2f} s" for key in ("median_seconds", "seconds_99")]
        name = f"{settings['clients']} clients, {count} row{'s' if count > 1 else ''} in a request"
        rows.append([name, f"{one['rows_per_second']:.0f}", f"{share:.2f}", met(share >= SERVED), *times])
    note = (
        f"{settings['tasks']:,} tasks of MiniLM behind one replica; every request is of another task. From texts of "
        f"{found['bank']['tokens']} tokens to predictions; clients, server and replica share the machine. Ready "
        f"{found['served']['seconds_until_ready']:.0f} s after the start. {machine(found)} "
        f"{versions(found, 'transformers', 'peft')}"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def soak(found: dict[str, Any]) -> str:
    """What a long run with changes and a killed replica counted."""
    if "soak" not in found:
        return ""
    run = found["soak"]
    steady = run["memory"][len(run["memory"]) // 2 :]
    heads = ["", "counted"]
    rows = [
        ["requests, rows", f"{run['requests']:,}, {run['rows']:,}"],
        ["tasks added, replaced or removed", f"{run['changes']:,}"],
        ["wrong answers (goal 0)", f"{run['wrong']} ({met(not run['wrong'])})"],
        ["requests without an answer (goal 0)", f"{run['not_answered']} ({met(not run['not_answered'])})"],
        ["longest request", f"{run['longest_seconds']:.1f} s"],
        *(
            [
                f"memory of the {name}, half-way and at the end",
                " and ".join(_size(one[key]) for one in (steady[0], steady[-1])),
            ]
            for name, key in (("server", "front_bytes"), ("replicas", "replicas_bytes"))
        ),
    ]
    note = (
        f"{run['seconds'] / 60:.3g} minutes, {run['replicas']} replicas of which one is killed, "
        f"{found['settings']['clients']} clients. Each row is compared with what a bank in a process says of its task."
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def _throughput_row(name: str, seconds: float, single: float, rows: int) -> list[str]:
    share = single / seconds
    return [name, f"{rows / seconds:.0f}", f"{share:.2f}", met(share >= THROUGHPUT) if " tasks of " in name else ""]


def _memory_row(row: dict[str, Any], *, asked: bool) -> list[str]:
    share = (row["mapped_bytes"] + row["anonymous_bytes"]) / row["numbers_bytes"]
    return [
        f"{row['tasks']:,}",
        *(_size(row[f"{kind}_bytes"]) for kind in ("numbers", "file", "mapped", "anonymous")),
        f"{share:.2f}",
        met(share <= MEMORY) if asked else "",
        f"{row['seconds_until_first_batch']:.1f} s",
    ]


def _size(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
