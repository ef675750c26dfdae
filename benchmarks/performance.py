"""The tables of docs/performance.md, and whether each goal was met."""

from collections.abc import Callable
from typing import Any

from benchmarks.markdown import machine, met, table, versions
from benchmarks.solvers import DENSE, OURS

OVER_DENSE, OVER_DENSE_FROM = 4, 2048
OVER_SCRIPT = 5
AT_ONCE, OVER_TORCH = 0.6, 1.2
"""Seconds until a command answers without measuring; `compare` to its first matrix, in units of `import torch`."""
OVER_SCRIPT_BY_WIDTH = {384: 1.3, 768: 2.5, 2048: 6, 4096: 12}
LARGEST_MATRICES = 12
OVER_SVD, MATRICES_OF_EXTRACTION, ENERGY_MISSED = 10, 6, 1e-4
EXPONENT = 1.1
"""An exponent up to this is called linear: what repeated timings can tell from 1."""


def solver_times(spectrum: str) -> Callable[[dict[str, Any]], str]:
    """Time and error of each method, a column for each shape."""

    def make(found: dict[str, Any]) -> str:
        problems = [one for one in found["problems"] if one["spectrum"] == spectrum]
        methods = [row["method"] for row in problems[-1]["methods"]] if problems else []
        rows = [[method, *(_solver_cell(_row(one, method), found) for one in problems)] for method in methods]
        absent = f" Not installed: {', '.join(found['settings']['absent'])}." if found["settings"]["absent"] else ""
        note = (
            f"k = {found['settings']['k']}. In bold: the error is at most {found['settings']['tolerance']:g}.{absent} "
            f"{machine(found)} {versions(found, 'scipy')}"
        )
        return f"{table(['', *(_shape(one) for one in problems)], rows)}\n\n{note}\n"

    return make


def solver_goals(found: dict[str, Any]) -> str:
    """Ours against the fastest peer that is accurate, and against the dense decomposition."""
    heads = [
        "matrix",
        "ours",
        "fastest accurate peer",
        "its time / ours",
        "goal 1",
        "torch.linalg.svd / ours",
        "goal 4",
    ]
    return table(heads, [_solver_goal(one, found["settings"]["tolerance"]) for one in found["problems"]]) + "\n"


def solver_products(found: dict[str, Any]) -> str:
    """Ours in units of its own matrix products."""
    heads = ["matrix", "ours", "solver", *(f"{name}, {dtype}" for name in ("AᵀA", "AV") for dtype in _DTYPES)]
    heads += [f"ours / (AᵀA + AV), {dtype}" for dtype in _DTYPES]
    return table(heads, [_products_row(one) for one in found["problems"]]) + "\n"


def whole_pair(found: dict[str, Any]) -> str:
    """Time and memory of each tool."""
    heads = ["", "matrices", "start-up", "time", "peak memory", "its own"]
    rows = [_tool_row(row) for row in found["rows"]]
    settings = found["settings"]
    pair = (
        "MiniLM and a finetuned copy"
        if settings["step"] is None
        else f"MiniLM and a copy with an update of {settings['step']:.0%} of the norm in every matrix"
    )
    peers = "".join(f"{name} {version}. " for name, version in found["peers"].items() if version)
    note = f"{pair}, least of {settings['repeats']} runs. {peers}{machine(found)} {versions(found, 'transformers')}"
    return f"{table(heads, rows)}\n\n{note}\n"


def whole_pair_goals(found: dict[str, Any]) -> str:
    """How many times faster each comparison is than what it is held against."""
    seconds = {row["tool"]: row["seconds"] for row in found["rows"] if "seconds" in row}
    draws = found["settings"]["draws"]
    without, drawn = "compare, no null", f"compare, {draws} draws"
    script, script_drawn = "script of two full SVDs per matrix", f"the same script with {draws} draws"
    held = [(without, script, OVER_SCRIPT), (drawn, script_drawn, OVER_SCRIPT), (drawn, script, OVER_SCRIPT)]
    held += [
        (ours, f"modeldelta, {scope}", 1) for ours in (without, drawn) for scope in ("the same matrices", "all tensors")
    ]
    rows = []
    for ours, against, goal in held:
        if ours in seconds and against in seconds:
            ratio = seconds[against] / seconds[ours]
            rows.append([ours, against, f"{ratio:.2f}", f"{goal}", met(ratio >= goal)])
    return table(["", "against", "its time / ours", "goal", ""], rows) + "\n"


def start_up(found: dict[str, Any]) -> str:
    """Seconds until a command answers, and whether that is soon enough."""
    torch = next(row["processor_seconds"] for row in found["rows"] if row["what"] == "import torch")
    rows = []
    for row in found["rows"]:
        seconds = row["processor_seconds"]
        goal, reached = "", ""
        if row["what"].startswith("compare"):
            goal, reached = f"at most {OVER_TORCH} of `import torch`", met(seconds <= OVER_TORCH * torch)
        elif row["what"] != "import torch":
            goal, reached = f"under {AT_ONCE} s", met(seconds < AT_ONCE)
        times = [_seconds(row["seconds"]), _seconds(seconds), f"{seconds / torch:.2f}"]
        rows.append([row["what"], *times, goal, reached])
    note = f"Least of {found['settings']['repeats']} processes each. {machine(found)} {versions(found)}"
    heads = ["", "clock", "processor", "processor / `import torch`", "goal", ""]
    return f"{table(heads, rows)}\n\n{note}\n"


def pairs(found: dict[str, Any]) -> str:
    """How many times faster `compare` is than a script, by width."""
    heads = ["width", "matrices", "compare, no null", "compare, default null", "script"]
    heads += ["script / compare, no null", "script / compare, default null", "goal", ""]
    rows = []
    for row in found["rows"]:
        without, null, script = (row["seconds"].get(tool) for tool in ("without", "null", "script"))
        goal = OVER_SCRIPT_BY_WIDTH[row["width"]]
        rows.append(
            [
                str(row["width"]),
                str(row["matrices"]),
                *("" if seconds is None else _seconds(seconds) for seconds in (without, null, script)),
                f"{script / without:.2f}",
                "" if null is None else f"{script / null:.2f}",
                f"{goal:g}",
                "" if null is None else met(script / null >= goal),
            ]
        )
    note = f"k = {found['settings']['k']}, processor time, least of at most 3 runs. {machine(found)} {versions(found)}"
    return f"{table(heads, rows)}\n\n{note}\n"


def memory(found: dict[str, Any]) -> str:
    """Memory above the floor in units of the largest matrix."""
    heads = ["each checkpoint", "layers", "matrices measured", "largest matrix (float32)", "peak above the floor"]
    heads += [
        "largest matrices",
        f"goal {LARGEST_MATRICES}",
        "own memory above the floor",
        "largest matrices",
        "as stored",
    ]
    floor = found["floor"]
    note = (
        f"The floor: {_size(floor['peak_bytes'])} peak, {_size(floor['peak_anonymous_bytes'])} own. "
        f"{found['settings']['draws']} draws. {machine(found)} {versions(found)}"
    )
    return f"{table(heads, [_memory_row(row, floor) for row in found['rows']])}\n\n{note}\n"


def large_matrices(found: dict[str, Any]) -> str:
    """Memory and time of a matrix that is measured whole and in row blocks, and how far the tables differ."""
    heads = [
        "matrix",
        "in float32",
        "memory, whole",
        "budget",
        "in row blocks",
        "processor time, whole",
        "in row blocks",
    ]
    heads += ["solver", "sine at most", "values differ by", "means of draws"]
    note = (
        f"Memory is what a process has of its own above that of one that compares a small matrix "
        f"({_size(found['floor'])}). k = {found['settings']['k']}, {found['settings']['draws']} draws of the scrambled "
        f"null, files in bfloat16. Hashes are equal. {machine(found)} {versions(found)}"
    )
    return f"{table(heads, [_large_row(row) for row in found['rows']])}\n\n{note}\n"


def extraction(found: dict[str, Any]) -> str:
    """Time, memory and energy of each way to a LoRA."""
    heads = ["update", "rank", *("extract", "torch.linalg.svd", "mergekit"), "times as fast", f"goal {OVER_SVD}"]
    heads += ["memory / matrix", "of svd", f"goal {MATRICES_OF_EXTRACTION}", "energy below the best", "goal 1e-4"]
    rows = [_extraction_row(row, found) for row in found["rows"]]
    side = found["side"]
    note = f"{side}×{side}, {_size(4 * side * side)} in float32. {machine(found)} {versions(found)}"
    return f"{table(heads, rows)}\n\n{note}\n"


def _extraction_row(row: dict[str, Any], found: dict[str, Any]) -> list[str]:
    tools, matrix = row["tools"], 4 * found["side"] ** 2
    ours, svd = tools["extract"], tools["torch"]
    seconds = [f"{tools[tool]['seconds']:.2f} s" if tool in tools else "–" for tool in ("extract", "torch", "mergekit")]
    faster = min(one["seconds"] for name, one in tools.items() if name != "extract") / ours["seconds"]
    matrices, of_svd = ((one["peak_bytes"] - found["floor"]) / matrix for one in (ours, svd))
    # The factors of svd are the best there are, apart from the rounding of float32.
    missed = max(1 - ours["energy"] / svd["energy"], 0.0)
    goals = [met(faster >= OVER_SVD), met(matrices <= MATRICES_OF_EXTRACTION), met(missed <= ENERGY_MISSED)]
    memory = [f"{matrices:.1f}", f"{of_svd:.1f}", goals[1]]
    return [row["update"], str(row["rank"]), *seconds, f"{faster:.1f}", goals[0], *memory, f"{missed:.0e}", goals[2]]


def scaling(found: dict[str, Any]) -> str:
    """Times over counts and the fitted exponents."""
    rows = []
    for series in found["series"]:
        counts = ", ".join(str(count) for count in series["counts"])
        times = ", ".join(f"{seconds:.2f}" for seconds in series["seconds"])
        exponent = series["exponent"]
        fixed = f"{series['fixed_seconds']:.2f}"
        rows.append([series["over"], counts, times, fixed, f"{exponent:.2f}", met(exponent <= EXPONENT)])
    settings = found["settings"]
    m, n = settings["shape"]
    note = (
        f"Matrices of {m}×{n}, k = {settings['k']}, {settings['draws']} draws; checkpoints of {settings['matrices']} "
        f"matrices; least of {settings['repeats']} runs. {machine(found)} {versions(found)}"
    )
    return f"{table(['over', 'counts', 'seconds', 'fixed', 'exponent', f'at most {EXPONENT}'], rows)}\n\n{note}\n"


_DTYPES = ("float32", "float64")


def _solver_cell(row: dict[str, Any], found: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"left out ({row['skipped']})"
    if "seconds" not in row:
        return "failed" if "failed" in row else ""
    cell = f"{_seconds(row['seconds'])} ({_error(row):.0e})"
    return f"**{cell}**" if _error(row) <= found["settings"]["tolerance"] else cell


def _solver_goal(one: dict[str, Any], tolerance: float) -> list[str]:
    accurate = {
        row["method"]: row["seconds"] for row in one["methods"] if "seconds" in row and _error(row) <= tolerance
    }
    ours, dense = _row(one, OURS), _row(one, DENSE)
    peers = {seconds: method for method, seconds in accurate.items() if method != OURS}
    label = f"{_shape(one)} {one['spectrum']}"
    if not peers or "seconds" not in ours:
        return [label, *[""] * 6]
    fastest = min(peers)
    ratio = fastest / ours["seconds"]
    over_dense = dense["seconds"] / ours["seconds"] if "seconds" in dense else None
    asked = min(one["shape"]) >= OVER_DENSE_FROM and over_dense is not None
    return [
        label,
        _seconds(ours["seconds"]),
        f"{peers[fastest]}, {_seconds(fastest)}",
        f"{ratio:.2f}",
        met(ratio >= 1 and OURS in accurate),
        "" if over_dense is None else f"{over_dense:.1f}",
        met(over_dense >= OVER_DENSE) if asked and over_dense is not None else "",
    ]


def _large_row(row: dict[str, Any]) -> list[str]:
    whole, blocks, differences = row["whole"], row["blocks"], row["largest_difference"]
    assert row["same_hashes"]
    return [
        _shape(row),
        _size(4 * row["shape"][0] * row["shape"][1]),
        _size(whole["peak_bytes"]),
        _size(row["budget"]),
        _size(blocks["peak_bytes"]),
        _seconds(whole["processor_seconds"]),
        _seconds(blocks["processor_seconds"]),
        blocks["solver"],
        f"{blocks['bound']:.0e}",
        *(f"{differences[name]:.0e}" for name in ("value", "null_mean")),
    ]


def _products_row(one: dict[str, Any]) -> list[str]:
    ours, products = _row(one, OURS), one["products"]
    if "seconds" not in ours:
        return [f"{_shape(one)} {one['spectrum']}", *[""] * 8]
    times = [_seconds(products[f"{name}_{dtype}"]) for name in ("gram", "apply") for dtype in _DTYPES]
    ratios = [f"{ours['seconds'] / (products[f'gram_{dtype}'] + products[f'apply_{dtype}']):.1f}" for dtype in _DTYPES]
    return [f"{_shape(one)} {one['spectrum']}", _seconds(ours["seconds"]), ours["solver"], *times, *ratios]


def _tool_row(row: dict[str, Any]) -> list[str]:
    if "seconds" not in row:
        return [row["tool"], *[""] * 2, "not installed or failed", *[""] * 2]
    times = [_seconds(row[field]) for field in ("start_up_seconds", "seconds")]
    return [
        row["tool"],
        str(row["matrices"]),
        *times,
        *(_size(row[f"peak_{kind}bytes"]) for kind in ("", "anonymous_")),
    ]


def _memory_row(row: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    stored, largest = 2 * row["largest_elements"], 4 * row["largest_elements"]
    peak = row["peak_bytes"] - floor["peak_bytes"]
    own = row["peak_anonymous_bytes"] - floor["peak_anonymous_bytes"]
    return [
        f"{row['checkpoint_bytes'] / 1e9:.1f} GB",
        str(row["layers"]),
        str(row["matrices"]),
        _size(largest),
        _size(peak),
        f"{peak / largest:.1f}",
        met(peak <= LARGEST_MATRICES * largest),
        _size(own),
        f"{own / largest:.1f}",
        f"{peak / stored:.1f}",
    ]


def _row(one: dict[str, Any], method: str) -> dict[str, Any]:
    return next((row for row in one["methods"] if row["method"] == method), {})


def _error(row: dict[str, Any]) -> float:
    return max(row["left"], row["right"])


def _shape(one: dict[str, Any]) -> str:
    return "×".join(str(side) for side in one["shape"])


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
