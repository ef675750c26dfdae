"""Tables and text that the command line prints."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from spectralbasis.printable import in_markup, printable

if TYPE_CHECKING:
    from spectralbasis.basis import SpectralBasis


PIPE_WIDTH = 160


def show(table: Table | Group) -> None:
    """Print a table on stdout, as wide as the terminal, or wide enough for all of it in a file or pipe."""
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def show_result(result: Mapping[str, Any], table: Callable[[Mapping[str, Any]], Table | Group], as_json: bool) -> None:
    """Print a command's result on stdout, as JSON or as a table."""
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show(table(result))


def show_report(page: Path, as_json: bool) -> None:
    """Print where a report lies, on stdout."""
    print(json.dumps({"report": str(page)}) if as_json else printable(page))


def basis_facts(basis: "SpectralBasis", file: Path) -> dict[str, Any]:
    """What a person or a script wants to know of a computed basis."""
    matrices = {
        name: {
            "shape": list(triplets.shape),
            "k": triplets.k,
            "subspace_error_bound": triplets.subspace_error_bound,
            "solver": triplets.solver,
        }
        for name, triplets in basis.items()
    }
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "source": basis.source,
        "leading": basis.leading,
        "matrices": matrices,
        "skipped": basis.skipped,
    }


def basis_table(facts: Mapping[str, Any]) -> Table:
    """One line per matrix with its certificate, then what was skipped."""
    table = _table(
        f"{facts['file']}: {len(facts['matrices'])} matrices, {facts['bytes'] / 1e6:.1f} MB",
        ["matrix", "shape", "k", "error bound", "solver"],
    )
    for name, one in facts["matrices"].items():
        m, n = one["shape"]
        table.add_row(
            in_markup(name), f"{m}×{n}", str(one["k"]), f"{one['subspace_error_bound']:.1e}", in_markup(one["solver"])
        )
    for name, reason in facts["skipped"].items():
        table.add_row(in_markup(name), "", "", "", f"skipped: {in_markup(reason)}")
    return table


def findings_table(summary: Mapping[str, Any]) -> Table:
    """Stability and coverage, overall and for each checkpoint, beside their null."""
    table = _table(
        f"{summary['matrices']} matrices compared{_part(summary)}, {len(summary['skipped'])} skipped; "
        f"leading = {summary['leading']}",
        ["checkpoint", "measure", "value", "null", "effect", "95 % interval", "p", "verdict"],
    )
    findings = dict(summary["per_tuned"])
    if len(findings) > 1:
        findings = {"all": summary, **findings}
    for label, finding in findings.items():
        for measure in ("stability", "trailing_stability", "coverage", "trailing_coverage"):
            if measure in finding:
                table.add_row(in_markup(label), measure.replace("_", " "), *_finding_cells(finding[measure]))
    if "sharing" in summary:
        sharing = summary["sharing"]
        table.add_row(f"pairs: {sharing['over']}", "sharing", *_finding_cells(sharing))
    notes = [f"{m}: {summary[m]['note']}" for m in ("stability", "coverage") if summary[m].get("note")]
    table.caption = in_markup("\n".join([*summary.get("notes", ()), *notes]))
    return table


def _part(summary: Mapping[str, Any]) -> str:
    """Which part of the model the verdicts are of; empty where it is all of it."""
    from spectralbasis.checkpoints.matching import share_text

    share = summary.get("measured_share", 1.0)
    return "" if share == 1 else f" ({share_text(share)} of the model)"


def plan_table(plan: Mapping[str, Any]) -> Group:
    """What a comparison will take: its matrices by shape, its steps, and how long it is on each executor."""
    count = sum(one["count"] for one in plan["matrices"])
    matrices = _table(
        f"{count} matrices to compare, {plan['skipped']} skipped; {plan['read_bytes'] / 1e9:.3g} GB to read",
        ["shape", "matrices", "k", "solver", "seconds each", "memory of a worker"],
    )
    for one in plan["matrices"]:
        m, n = one["shape"]
        cells = (f"{m}×{n}", str(one["count"]), str(one["k"]), in_markup(one["solver"]))
        matrices.add_row(*cells, f"{one['seconds']:.3g}", f"{one['memory_bytes'] / 1e9:.3g} GB")
    steps = _table(f"{plan['operations']:.3g} floating-point operations", ["step", "operations", "time of one worker"])
    for name, step in plan["steps"].items():
        steps.add_row(name, f"{step['operations']:.3g}", duration(step["seconds"]))
    executors = _table("expected time", ["where", "time"])
    for one in plan["executors"]:
        executors.add_row(in_markup(one["name"]), duration(one["seconds"]))
    return Group(matrices, "", steps, "", executors)


def duration(seconds: float) -> str:
    """A time in the unit that suits it, with about three digits."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


ROWS_SHOWN = 50


def bank_facts(file: Path) -> dict[str, Any]:
    """What a bank holds: what its tasks have in common, and of each task the labels of its heads."""
    from spectralbasis.coefficients.bank_file import map_rows, read_bank

    found = read_bank(file)
    layout, labels = found.layout, {head: list[int]() for head in found.layout.heads}
    if found.tasks:
        rows = map_rows(file, found.offset, (len(found.tasks), layout.width), found.dtype)
        for start in range(0, len(rows), 4096):
            for head, counts in layout.labels_of_all(rows[start : start + 4096]).items():
                labels[head] += counts
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "base": layout.config.base_model_name_or_path,
        "task_type": layout.config.task_type,
        "coefficients": layout.config.coefficients,
        "matrices": len(layout.shapes),
        "numbers": layout.width,
        "dtype": str(found.dtype).removeprefix("torch."),
        "tasks": {task: {head: labels[head][row] for head in labels} for row, task in enumerate(found.tasks)},
    }


def bank_table(facts: Mapping[str, Any]) -> Table:
    """One line per task with the labels of its heads, the first of many."""
    tasks = facts["tasks"]
    size = f"{facts['bytes'] / 1e6:,.1f} MB"
    table = _table(f"{facts['file']}: {len(tasks):,} tasks of {facts['numbers']:,} numbers, {size}", ["task", "labels"])
    for task, labels in list(tasks.items())[:ROWS_SHOWN]:
        table.add_row(
            in_markup(task), in_markup(", ".join(f"{count} ({head})" for head, count in labels.items()) or "–")
        )
    more = f"; {len(tasks) - ROWS_SHOWN:,} more tasks are in the output of --json" if len(tasks) > ROWS_SHOWN else ""
    table.caption = in_markup(
        f"{facts['coefficients']} coefficients of {facts['matrices']} matrices of "
        f"{facts['base'] or 'an unnamed base'}, {facts['dtype']}{more}"
    )
    return table


def similarity_table(result: Mapping[str, Any]) -> Table:
    """Cosines of every two checkpoints: of their coefficients and of their updates."""
    table = _table(f"{result['matrices']} matrices", ["checkpoint", "checkpoint", "coefficients", "updates"])
    for pair in result["pairs"]:
        cosines = (_number(pair[kind], "+.4f") for kind in ("coefficients", "updates"))
        table.add_row(in_markup(pair["a"]), in_markup(pair["b"]), *cosines)
    return table


def lora_table(result: Mapping[str, Any]) -> Table:
    """Ranks, size and error of an exported LoRA adapter."""
    table = _facts(f"LoRA adapter → {result['output']}")
    smallest = min(result["ranks"].values())
    filled = "" if smallest == result["rank"] else f" (from {smallest} on, filled up with zeros)"
    table.add_row("matrices", str(len(result["ranks"])))
    table.add_row("rank", f"{result['rank']}{filled}")
    table.add_row("numbers", f"{result['parameters']:,}")
    table.add_row("relative error", f"{result['error']:.2%}")
    return _with_notes(table, result["notes"])


def extraction_table(result: Mapping[str, Any]) -> Table:
    """What an extracted adapter holds of each matrix, and of all."""
    kind = "LoRA" if result["to"] == "lora" else "spectral adapter"
    asked = any(one["intruders"] is not None for one in result["matrices"].values())
    columns = ["matrix", "shape", "rank", "‖ΔW‖", "energy", "best possible", "may miss"]
    table = _table(f"{kind} → {result['output']}", [*columns, "intruders left out"] if asked else columns)
    for name, one in result["matrices"].items():
        m, n = one["shape"]
        cells = [in_markup(name), f"{m}×{n}", str(one["rank"]), f"{one['update_norm']:.4g}", *_energies(one)]
        dropped = [f"{one['intruders']} ({one['removed_energy']:.2%} of the energy)"] if asked else []
        table.add_row(*cells, *dropped)
    dropped = [f"{result['removed_energy']:.2%} of the energy"] if asked else []
    table.add_row("all", "", f"≤ {result['rank']}", "", *_energies(result), *dropped, style="bold")
    said = [f"{result['parameters']:,} numbers; relative error of the update: {result['relative_error']:.2e}."]
    if result["exact"]:
        said.append("Base and adapter are the finetuned model, apart from rounding.")
    if result["whole"] or result["biases"]:
        said.append(f"Saved whole: {len(result['whole'])} modules, {result['biases']} biases.")
    if result["left_out"]:
        said.append(f"Left out: {len(result['left_out'])} (listed on stderr).")
    if (check := result["check"]) is not None:
        agreement = "" if check["agreement"] is None else f"; the same largest logit in {check['agreement']:.2%}"
        said.append(
            f"Outputs on {check['texts']} texts ({check['output']}): they differ from the finetuned model's by "
            f"{check['mean']:.3g} on average and {check['largest']:.3g} at most{agreement}. The base differs by "
            f"{check['mean_of_base']:.3g} on average; outputs have the mean size {check['scale']:.3g}."
        )
    table.caption = in_markup("\n".join([*said, *result["notes"]]))
    return table


def _energies(one: Mapping[str, Any]) -> list[str]:
    return [f"{one['energy']:.4%}", f"{one['best_energy']:.4%}", f"{one['error_bound']:.1e}"]


def _with_notes(table: Table, notes: list[str]) -> Table:
    for note in notes:
        table.add_row("note", in_markup(note))
    return table


def merged_table(result: Mapping[str, Any]) -> Table:
    """What a merged checkpoint holds."""
    table = _facts(f"merged checkpoint → {result['output']}")
    table.add_row("tensors", f"{result['tensors']} ({result['changed']} changed, {result['added']} added)")
    table.add_row("weights", f"{result['bytes'] / 1e6:.1f} MB in {len(result['files'])} file(s)")
    table.add_row("largest rounding", f"{result['largest_rounding']:.2g}")
    return _with_notes(table, result["notes"])


def combination_table(result: Mapping[str, Any]) -> Table:
    """What an adapter was combined from."""
    table = _table(f"{result['method']} → {result['output']}", ["adapter", "weight"])
    for adapter, weight in zip(result["adapters"], result["weights"], strict=True):
        table.add_row(in_markup(adapter), f"{weight:g}")
    table.caption = f"{result['coefficients']} coefficients of {result['matrices']} matrices"
    return table


def claims_table(content: Mapping[str, Any]) -> Table:
    """The primary claims of a study with their verdicts, by experiment."""
    table = _table(f"study, preset {content['preset']}", ["experiment", "runs", "claim", "effect", "units", "verdict"])
    for name, part in content["experiments"].items():
        runs, explored = f"{part['finished']}/{part['planned']}", 0
        for claim in part["claims"]:
            if claim["primary"]:
                shown = (claim["text"], _number(claim["effect"], "+.2g"), claim["units"], claim["verdict"])
                table.add_row(in_markup(name), runs, *map(in_markup, shown))
            else:
                explored += 1
        if explored:
            table.add_row(
                in_markup(name), runs, f"{explored} claims of exploration: see {in_markup(name)}.md", "", "", ""
            )
    return table


def machine_table(facts: Mapping[str, Any]) -> Table:
    """What a machine offers, and under it what to change."""
    machine, speed, cache = facts["machine"], facts["speed"], facts["cache"]
    table = _facts("this machine")
    for name, version in {**facts["versions"], **facts["optional"]}.items():
        table.add_row(in_markup(name), in_markup(version or "–"))
    table.add_row(
        "system", in_markup(f"{machine['system']}, {machine['instructions']}{', bf16' if machine['bf16'] else ''}")
    )
    table.add_row(
        "cores, threads, load", f"{machine['cores']}, {machine['threads']}, {_number(machine['load'], '.1f')}"
    )
    memory = (machine["available_bytes"] / 1e9, machine["memory_bytes"] / 1e9)
    table.add_row("memory", "{:.1f} GB free of {:.1f} GB".format(*memory))
    table.add_row("devices", in_markup(", ".join(machine["devices"])) or "only the processor")
    table.add_row("GFLOP/s, float32", f"{speed['one_thread']:g} with one thread, {speed['all_threads']:g} with all")
    table.add_row("cache", f"{in_markup(cache['folder'])}: {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB")
    table.caption = in_markup("\n".join(f"• {sentence}" for sentence in facts["advice"]))
    return table


def _finding_cells(finding: Mapping[str, Any]) -> list[str]:
    interval = "–" if finding["ci_low"] is None else f"{finding['ci_low']:+.4f} to {finding['ci_high']:+.4f}"
    return [
        _number(finding["value"]),
        _number(finding["null_mean"]),
        _number(finding["effect"], "+.4f"),
        interval,
        _number(finding["p_value"], ".2g"),
        str(finding["verdict"]),
    ]


def tuning_table(result: Mapping[str, Any]) -> Table:
    """Scores, trained numbers and size of one tuned model."""
    table = _facts(f"{result['method']} on {result['task']} → {result['output']}")
    _add_scores(table, result)
    table.add_row("trained in the backbone", _count(result["parameters_backbone"], result["share_backbone"]))
    table.add_row("trained in the head", _count(result["parameters_head"], result["share_head"]))
    table.add_row("bytes on disk", f"{result['adapter_bytes']:,}")
    table.add_row("steps, seconds per step", f"{result['steps']}, {result['seconds_per_step']:.3f}")
    return table


def scores_table(result: Mapping[str, Any]) -> Table:
    """Scores of one evaluated model."""
    table = _facts(f"{result['adapter'] or result['model']} on {result['task']}")
    _add_scores(table, result)
    table.add_row("examples", str(result["examples"]))
    return table


def predictions_table(result: Mapping[str, Any]) -> Table:
    """What was predicted, and into which file."""
    table = _facts(f"{result['adapter'] or result['model']} on {result['input']} → {result['output']}")
    table.add_row("rows", f"{result['rows']:,}")
    table.add_row("time", duration(result["seconds"]))
    table.add_row("columns", in_markup(", ".join(result["columns"])))
    return table


def _add_scores(table: Table, result: Mapping[str, Any]) -> None:
    for name, value in result["metrics"].items():
        table.add_row(f"[bold]{in_markup(name)}[/]" if name == result["metric"] else in_markup(name), f"{value:.4f}")
    table.add_row("scored on", in_markup(str(result["evaluation_split"])))


def _count(count: int, share: float) -> str:
    return f"{count:,} ({share:.4%} of the model)"


def _number(value: float | None, style: str = ".4f") -> str:
    return "–" if value is None else format(value, style)


def _facts(title: str) -> Table:
    table = _table(title, ["", ""])
    table.show_header = False
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(
        title=in_markup(title),
        title_justify="left",
        caption_justify="left",
        box=None,
        pad_edge=False,
        min_width=len(title),
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
