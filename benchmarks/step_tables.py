"""The tables of docs/performance.md on training steps, and of docs/learning-rates.md."""

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.adapters import CORE, DIAGONAL, FLOOR, LORA
from benchmarks.markdown import machine, met, table, versions

OVER_FLOOR = {"MiniLM": 1.15, "BERT-base": 1.06}
GOAL_TOKENS = 2048
KEPT_OVER_FLOOR, KEPT_OVER_LORA = 1.07, 0.76
SMALL_GOALS = {
    ("tiny", "1x4", "step"): 0.80,
    ("tiny", "1x4", "inference"): 0.80,
    ("MiniLM", "1x16", "step"): 0.95,
    ("MiniLM", "1x16", "inference"): 0.90,
    ("MiniLM", "8x64", "step"): 0.82,
    ("MiniLM", "8x64", "inference"): 0.90,
}
"""Model, batch and kind → largest share of LoRA's time."""


def step_times(precision: str) -> Callable[[dict[str, Any]], str]:
    """Time of a step over the floor's, a column for each model and batch."""

    def make(found: dict[str, Any]) -> str:
        cells = [cell for cell in found["cells"] if cell["precision"] == precision]
        methods = list(dict.fromkeys(row["method"] for cell in cells for row in cell["methods"]))
        rows = [[method, *(_ratio(cell, method, FLOOR, "seconds") for cell in cells)] for method in methods]
        rows.append(["the floor's step", *(_milliseconds(_row(cell, FLOOR)["seconds"]) for cell in cells)])
        note = f"{precision}{'' if precision == 'float32' else ' autocast'}. {machine(found)} {versions(found, 'peft')}"
        return f"{table(['', *map(_name, cells)], rows)}\n\n{note}\n"

    return make


def step_memory(found: dict[str, Any]) -> str:
    """Bytes kept for the backward pass."""
    cells = [cell for cell in found["cells"] if cell["batch"] * cell["length"] == GOAL_TOKENS and cell["batch"] == 32]
    methods = list(dict.fromkeys(row["method"] for cell in cells for row in cell["methods"]))
    rows = [[method, *(_megabytes(cell, method) for cell in cells)] for method in methods]
    return table(["", *(f"{_name(cell)}, {cell['precision']}" for cell in cells)], rows) + "\n"


def step_goals(found: dict[str, Any]) -> str:
    """Each goal and whether it was met, a row for each model, batch and precision."""
    heads = ["", "diagonal / floor", "goal", "", "LoRA / diagonal", "goal 1", "LoRA / core", "goal 1"]
    heads += ["kept / floor", f"goal {KEPT_OVER_FLOOR}", "kept / LoRA's", f"goal {KEPT_OVER_LORA}"]
    return table(heads, [_goal_row(cell) for cell in found["cells"]]) + "\n"


def small_steps(found: dict[str, Any]) -> str:
    """Time over LoRA's of small steps and of inference, and launches of each adapted layer beyond the floor's."""
    cells = found["cells"]
    methods = list(dict.fromkeys(row["method"] for cell in cells for row in cell["methods"]))
    rows = [
        [method, *(f"{_over_lora(cell, method):.2f} ({_row(cell, method)['launches']:.1f})" for cell in cells)]
        for method in methods
    ]
    rows.append(["the floor", *(f"{1000 * median(_row(cell, FLOOR)['seconds']):.1f} ms" for cell in cells)])
    rows.append(["goal", *(f"{SMALL_GOALS[_small(cell)]:.2f}" for cell in cells)])
    for ours in ("diagonal", "core"):
        goals = (met(_over_lora(cell, ours) <= SMALL_GOALS[_small(cell)]) for cell in cells)
        rows.append([f"{ours} meets it", *goals])
    heads = ["", *(f"{cell['size']} {cell['shape'].replace('x', '×')} {cell['kind']}" for cell in cells)]
    note = f"Medians of {found['settings']['repeats']} rounds. {machine(found)} {versions(found, 'peft')}"
    return f"{table(heads, rows)}\n\n{note}\n"


def _small(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["size"], cell["shape"], cell["kind"]


def _over_lora(cell: dict[str, Any], method: str) -> float:
    pairs = zip(_row(cell, method)["seconds"], _row(cell, LORA)["seconds"], strict=True)
    return median(ours / theirs for ours, theirs in pairs)


def loading(found: dict[str, Any]) -> str:
    """Seconds to make and load an adapter, and bytes of its file."""
    rows = {row["method"]: row for row in found["rows"]}
    lora = rows[LORA]["load_seconds"]
    cells = [
        [
            name,
            *(_milliseconds(row[f"{what}_seconds"]) for what in ("first", "again", "load")),
            f"{row['load_seconds'] / lora:.2f}",
            f"{row['trained']:,}",
            f"{row['weight_bytes'] / 1e3:.0f} kB",
        ]
        for name, row in rows.items()
    ]
    heads = ["", "made first", "made again", "loaded", "loaded / LoRA's", "numbers", "weights on disk"]
    note = (
        f"MiniLM, all linear layers, no head; least of {found['settings']['repeats']}. {machine(found)} "
        f"{versions(found, 'peft')}"
    )
    return f"{table(heads, cells)}\n\n{note}\n"


def learning_rates(found: dict[str, Any]) -> str:
    """Mean and largest regret of each unit and rate over all finished cells, and for each mode."""
    tried = Counter(map(_cell, found["runs"]))
    cells = sorted(cell for cell, number in tried.items() if number == max(tried.values()))
    runs = [run for run in found["runs"] if _cell(run) in cells]
    best = {cell: max(run["score"] for run in runs if _cell(run) == cell) for cell in cells}
    rows = []
    for scaling, rate in dict.fromkeys((run["scaling"], run["rate"]) for run in runs):
        regrets = {
            _cell(run): best[_cell(run)] - run["score"]
            for run in runs
            if (run["scaling"], run["rate"]) == (scaling, rate)
        }
        groups = [
            list(regrets.values()),
            *([r for cell, r in regrets.items() if cell[2] == mode] for mode in ("diagonal", "core")),
        ]
        rows.append([scaling, f"{rate:g}", *(cell for group in groups for cell in _mean_and_largest(group))])
    heads = ["unit", "rate", "mean regret", "largest", "diagonal: mean", "largest", "core: mean", "largest"]
    note = (
        f"{len(cells)} cells ({', '.join(' '.join(cell) for cell in cells)}), one seed each. {versions(found, 'peft')}"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def _mean_and_largest(regrets: list[float]) -> list[str]:
    return [f"{sum(regrets) / len(regrets):.3f}", f"{max(regrets):.3f}"] if regrets else ["", ""]


def _goal_row(cell: dict[str, Any]) -> list[str]:
    seconds, kept = (
        {name: _row(cell, name)[field] for name in (FLOOR, DIAGONAL, CORE, LORA)} for field in ("seconds", "kept_bytes")
    )
    over_floor = seconds[DIAGONAL] / seconds[FLOOR]
    asked = cell["batch"] * cell["length"] == GOAL_TOKENS and cell["precision"] == "float32"
    goal = OVER_FLOOR[cell["size"]]
    of_floor, of_lora = kept[DIAGONAL] / kept[FLOOR], kept[DIAGONAL] / kept[LORA]
    return [
        f"{_name(cell)}, {cell['precision']}",
        f"{over_floor:.2f}",
        *((f"{goal}", met(over_floor <= goal)) if asked else ("", "")),
        *(
            part
            for ours in (DIAGONAL, CORE)
            for part in (f"{seconds[LORA] / seconds[ours]:.2f}", met(seconds[ours] <= seconds[LORA]))
        ),
        f"{of_floor:.2f}",
        met(of_floor <= KEPT_OVER_FLOOR),
        f"{of_lora:.2f}",
        met(of_lora <= KEPT_OVER_LORA),
    ]


def _cell(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["model"], run["task"], run["mode"]


def _row(cell: dict[str, Any], method: str) -> dict[str, Any]:
    return next((row for row in cell["methods"] if row["method"] == method), {})


def _ratio(cell: dict[str, Any], method: str, over: str, field: str) -> str:
    row = _row(cell, method)
    return f"{row[field] / _row(cell, over)[field]:.2f}" if row else ""


def _megabytes(cell: dict[str, Any], method: str) -> str:
    row = _row(cell, method)
    return f"{row['kept_bytes'] / 1e6:.0f} MB ({_ratio(cell, method, FLOOR, 'kept_bytes')})" if row else ""


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['size']} {cell['batch']}×{cell['length']}"
