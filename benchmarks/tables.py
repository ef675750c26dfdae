"""Writes the tables of the documentation from the results of the benchmarks: `python -m benchmarks.tables`.

A page marks where a table belongs with `<!-- table NAME: made by python -m benchmarks.tables -->` and
`<!-- end of table -->`; what stands between is replaced once there are results.
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import bank_tables, fault_tables, performance, scale_tables, step_tables
from benchmarks.markdown import table, versions
from benchmarks.results import FOLDER, read

DOCS = Path(__file__).parents[1] / "docs"
PLACE = re.compile(
    r"(<!-- table (\w+): made by python -m benchmarks\.tables -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def main() -> None:
    for page in sorted(DOCS.glob("*.md")):
        page.write_text(PLACE.sub(filled, page.read_text()))


def filled(place: re.Match[str]) -> str:
    """The place with its table, or with a note where nothing was measured yet."""
    start, name, end = place.groups()
    result, make = TABLES[name]
    found = make(read(result)) if (FOLDER / f"{result}.json").exists() else ""
    found = found or "*Not measured yet.*\n"
    return f"{start}\n{found}\n{end}"


def calibration(found: dict[str, Any]) -> str:
    """Rates of verdicts, a row for each step and planted strength."""
    settings = found["settings"]
    rows = [
        [
            f"{row['step']:.0%}",
            f"{row['strength']:.0%}",
            *(
                f"{row[f'{claim}_{verdict}']:.0%}"
                for claim in ("stability", "coverage")
                for verdict in ("supported", "contradicted")
            ),
        ]
        for row in found["rows"]
    ]
    heads = ["step", "planted", "stability supported", "contradicted", "coverage supported", "contradicted"]
    m, n = settings["shape"]
    note = (
        f"{settings['trials']} simulated comparisons for each row, {settings['matrices']} matrices of {m}×{n} in "
        f"{settings['layers']} layers, k = {settings['k']}, 5 draws. {versions(found)}"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def quantization(found: dict[str, Any]) -> str:
    """A row for each type of GGUF."""
    rows = [
        [
            row["kind"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['update']:.2%}",
            f"{row['overlap']:.5f}",
            f"{row['lowest_overlap']:.5f}",
            f"{row['shift']:.2%}",
            f"{row['coverage']:.4f} ({row['null_coverage']:.4f})",
        ]
        for row in found["rows"]
    ]
    k = found["settings"]["leading"]
    heads = [
        "type",
        "MB",
        "‖ΔW‖ / ‖W‖",
        f"overlap, k = {k}",
        "lowest",
        "largest shift of σ",
        "coverage (null)",
    ]
    note = (
        f"Medians over {found['rows'][0]['matrices']} matrices, without embeddings; the lowest overlap and the largest "
        f"shift of the first {k} singular values are those of any matrix. Coverage: share of ΔW in the leading core, "
        f"and its mean under the scrambled null. {versions(found)}"
    )
    return f"{table(heads, rows)}\n\n{note}\n"


def instructions(found: dict[str, Any]) -> str:
    """A row for the untrained model, and one for each method."""
    settings = found["settings"]
    rows = [
        [
            row["method"],
            f"{row['parameters']:,}",
            f"{row['exact']:.0%}",
            f"{-row['log_likelihood']:.4f}",
            f"`{row['answers'][0][2]}`",
        ]
        for row in found["rows"]
    ]
    asked, wanted, _ = found["rows"][0]["answers"][0]
    note = (
        f"stories260K (260,032 parameters); {settings['train']} questions, {settings['steps']} steps, "
        f'{settings["test"]} questions about sentences that were not trained on. The first is "{asked}" ({wanted}). '
        f"{versions(found, 'transformers', 'peft')}"
    )
    heads = ["method", "trained numbers", "exact answers", "loss of a token", "first answer"]
    return f"{table(heads, rows)}\n\n{note}\n"


def defaults(found: dict[str, Any]) -> str:
    """A row for each method: what it trains, its file, and its mean score on each table."""
    rows, cells = found["rows"], []
    tables = list(dict.fromkeys(row["table"] for row in rows))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        scores = [fmean(row["score"] for row in own if row["table"] == name) for name in tables]
        costs = [f"{own[0]['numbers']:,}", f"{own[0]['bytes'] / 1e3:,.0f} kB"]
        cells.append([method, *costs, *(f"{score:.3f}" for score in scores)])
    metrics = {row["table"]: row["metric"] for row in rows}
    steps = {row["table"]: row["steps"] for row in rows}
    heads = ["method", "numbers", "file, with the head", *(f"{name}: {metrics[name]}" for name in tables)]
    lengths = ", ".join(f"{steps[name]} steps on {name}" for name in tables)
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows})))
    note = f"MiniLM; {lengths}; seed {seeds}. {versions(found, 'transformers', 'peft')}"
    return f"{table(heads, cells)}\n\n{note}\n"


def closed_forms(found: dict[str, Any]) -> str:
    """The null in closed form beside draws, a row for each step of the random bases and of a model's matrices."""
    rows = []
    for label, of_model in (("random", False), ("of a model", True)):
        kind = [row for row in found["rows"] if ("model" in row["base"]) == of_model]
        for step in sorted({row["step"] for row in kind}):
            cases = [row for row in kind if row["step"] == step]
            known = [row for row in cases if row["admitted"]]
            if not known:
                rows.append([label, f"{step:g}", f"0 of {len(cases)}", *["–"] * 6])
                continue
            means = [row["mean"] for row in known]
            beyond = sum(abs(row["mean"] - 1) > 0.05 + 2 * row["error"] for row in known)
            rows.append(
                [
                    label,
                    f"{step:g}",
                    f"{len(known)} of {len(cases)}",
                    f"{fmean(means):.3f} ({min(means):.2f} to {max(means):.2f})",
                    f"{fmean(row['error'] for row in known):.3f}",
                    f"{beyond}",
                    f"{fmean(row['std'] for row in known):.2f}",
                    f"{fmean(row['below_05'] for row in known):.1%}",
                    f"{fmean(row['below_01'] for row in known):.1%}",
                ]
            )
    heads = ["base", "step", "admitted", "mean / draws", "error of draws", "farther than 5 % and 2 errors"]
    heads += ["standard deviation / draws", "p < 0.05", "p < 0.01"]
    note = f"{found['settings']['draws']} draws for each case; left and right vectors count apart. {versions(found)}"
    return f"{table(heads, rows)}\n\n{note}\n"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "calibration": ("calibration", calibration),
    "quantization": ("quantization", quantization),
    "closed_forms": ("closed_forms", closed_forms),
    "instructions": ("instructions", instructions),
    "defaults": ("defaults", defaults),
    "solvers_steep": ("leading_triplets", performance.solver_times("steep")),
    "solvers_flat": ("leading_triplets", performance.solver_times("flat")),
    "solver_goals": ("leading_triplets", performance.solver_goals),
    "solver_products": ("leading_triplets", performance.solver_products),
    "whole_pair": ("whole_pair", performance.whole_pair),
    "whole_pair_goals": ("whole_pair", performance.whole_pair_goals),
    "start_up": ("start_up", performance.start_up),
    "pairs": ("pairs", performance.pairs),
    "memory": ("memory", performance.memory),
    "large_matrices": ("large_matrices", performance.large_matrices),
    "extraction": ("extraction", performance.extraction),
    "scaling": ("scaling", performance.scaling),
    "plan_checked": ("planning", scale_tables.checked),
    "plan_assumptions": ("planning", scale_tables.assumptions),
    "plan_large": ("planning", scale_tables.large),
    "step_times_float32": ("steps", step_tables.step_times("float32")),
    "step_times_bfloat16": ("steps", step_tables.step_times("bfloat16")),
    "step_memory": ("steps", step_tables.step_memory),
    "step_goals": ("steps", step_tables.step_goals),
    "step_times_gpu": ("steps_gpu", step_tables.step_times("bfloat16")),
    "step_memory_gpu": ("steps_gpu", step_tables.step_memory),
    "small_steps": ("small_steps", step_tables.small_steps),
    "loading": ("loading", step_tables.loading),
    "learning_rates": ("learning_rates", step_tables.learning_rates),
    "hostile": ("hostile", fault_tables.hostile),
    "bank_throughput": ("bank", bank_tables.throughput),
    "bank_memory": ("bank", bank_tables.memory),
    "bank_sizes": ("bank", bank_tables.sizes),
    "serving_throughput": ("serving", bank_tables.serving),
    "serving_soak": ("serving", bank_tables.soak),
    "faults_totals": ("faults", fault_tables.totals),
    "faults_killed": ("faults", fault_tables.faults("killed")),
    "faults_interrupted": ("faults", fault_tables.faults("Ctrl-C")),
    "faults_full": ("faults", fault_tables.faults("full disk")),
    "faults_read_only": ("faults", fault_tables.faults("read-only")),
    "faults_writers": ("faults", fault_tables.faults("two writers")),
    "faults_damaged": ("faults", fault_tables.faults("damaged")),
    "faults_memory": ("faults", fault_tables.faults("memory")),
    "faults_clock": ("faults", fault_tables.faults("clock")),
}
"""Name of a table → the benchmark that it shows, and what makes it: an empty text where its part was not measured."""


if __name__ == "__main__":
    main()
