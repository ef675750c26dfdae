"""What a comparison gives back: a tidy table, a summary and a page.

Compares checkpoints: pairs their matrices by name, has each pair measured, and sums up.
"""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spectralbasis.checkpoints.matching import describe_unpaired, share_text
from spectralbasis.comparison.distributing import affordable_workers, announce_row_blocks, free_memory, measured
from spectralbasis.comparison.measuring import ROUNDED, UNCHANGED, MatrixTask, Outcome, Settings
from spectralbasis.comparison.metrics import SharedRow, to_frame
from spectralbasis.comparison.pairing import Pairing, open_pairs
from spectralbasis.comparison.sharing import Pair
from spectralbasis.comparison.statistics import with_q_values
from spectralbasis.comparison.store import Store
from spectralbasis.comparison.summary import summarise
from spectralbasis.errors import InputError
from spectralbasis.execution import open_executor
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.printable import track
from spectralbasis.sizes import parse_size
from spectralbasis.triplets import check_tolerance


@dataclass(frozen=True)
class Comparison:
    """Results of `compare`.

    Attributes:
        table: one row per measurement; the columns are the fields of `comparison.rows.Row`.
        sharing: the same between every two finetuned checkpoints (`comparison.rows.SharedRow`); None where there is
            only one.
    """

    table: pd.DataFrame
    _summary: dict[str, Any]
    sharing: pd.DataFrame | None = None

    def summary(self) -> dict[str, Any]:
        """Verdicts with their intervals, settings, versions: the content of `summary.json`."""
        return self._summary

    def save(self, directory: str | Path) -> None:
        """Write `comparison.parquet`, `summary.json` and, of several checkpoints, `sharing.parquet` into a folder."""
        folder = Path(directory)
        claim_files(folder, "comparison.parquet", "summary.json", "sharing.parquet")
        # All are written before the first takes its place: a full disk leaves the files of an earlier run together.
        with ExitStack() as files:
            if self.sharing is not None:
                _write(self.sharing, files.enter_context(atomic_path(folder / "sharing.parquet")))
            _write(self.table, files.enter_context(atomic_path(folder / "comparison.parquet")))
            summary = files.enter_context(atomic_path(folder / "summary.json"))
            summary.write_text(json.dumps(self._summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if self.sharing is None:
            (folder / "sharing.parquet").unlink(missing_ok=True)

    def report(self, directory: str | Path) -> Path:
        """Write the results and the page made from them into a folder; returns the path of `index.html`."""
        # Reports read results and never the other way round: this is the one place that calls forward.
        from spectralbasis.report import write_report

        self.save(directory)
        return write_report(Path(directory))


def _write(table: pd.DataFrame, file: Path) -> None:
    table.to_parquet(file, index=False, write_page_checksum=True)


FILES = ("comparison.parquet", "sharing.parquet", "summary.json", "index.html")
"""What `compare` writes into its output folder, beside the store."""


def compare(
    base: Any,
    tuned: Sequence[Any],
    *,
    leading: Leading = "auto",
    null: str | None = "scrambled",
    draws: int = 5,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    partial: bool = False,
    device: str = "cpu",
    trailing: bool = False,
    workers: int = 1,
    ray: str | None = None,
    memory_budget: str | int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    trust: bool = False,
    progress: bool = False,
) -> Comparison:
    """Measure what finetuning did to the leading singular vectors of a base model.

    Args:
        base: the pretrained checkpoint: a path, a hub id, a state dict, a module.
        tuned: one or more checkpoints finetuned from it; PEFT adapter folders are read over `base`.
        leading: number of leading directions: a whole number (all directions of a matrix that has fewer), a fraction
            of min(m, n), "mp", "gd", or "auto" for 64, or half of min(m, n) where that is less.
        null: "scrambled", "gaussian", or None for no draws (then nothing is tested).
        draws: draws of the null per matrix; 2 are needed for a z-score, 5 or more are sensible.
        tasks: what each of `tuned` was finetuned to, in their order; checkpoints of one task, as of several seeds, are
            the ceiling for what checkpoints of different tasks share.
        seed: of the draws and of the bootstrap.
        tolerance: largest sine accepted between computed and true leading subspaces.
        include: glob patterns of matrix names to measure; empty measures all but embeddings and heads.
        exclude: glob patterns of matrix names to leave out.
        partial: compare an adapter also where the base lacks some of what it adapts, which is listed as skipped.
        device: where matrices are decomposed, such as "cpu" or "cuda".
        trailing: measure the trailing directions beside the leading ones; it takes a full decomposition each time.
        workers: processes that measure matrices side by side, or fewer where memory does not suffice for so many; the
            table does not depend on it.
        ray: address of a Ray cluster, "auto" for the one that this machine belongs to, or "local", in place of local
            processes; the table does not depend on it.
        memory_budget: bytes, or text such as "8GB", that each process may work in: a matrix that takes more is read
            from its file in row blocks, and the table is the same but for the rounding of float32. None: the memory
            that is free, divided among the processes; no limit on a Ray cluster.
        output: folder for `comparison.parquet`, `summary.json`, `index.html` and the store; None writes nothing.
        resume: take over what an earlier run into `output` measured on the same weights with the same settings.
        trust: with `resume`, take over also what another user or machine stored in `output`; see `Store`.
        progress: draw a progress bar on stderr.

    Returns:
        The comparison. Where no weight of either side can be read, as where both are quantized in a way that is not
        decoded, its table is empty, its verdicts are "undecided" and `unpaired` of its summary says why.

    Raises:
        InputError: a checkpoint cannot be read, the models have no matrix in common or nothing changed between them,
            the memory budget is malformed, or the output folder cannot be used.
    """
    started = time.monotonic()
    budget = None if memory_budget is None else parse_size(memory_budget)
    if ray is None:
        _check_device(device)
    check_tolerance(tolerance)
    settings = Settings(parse_leading(leading), null, draws, seed, tolerance, device, trailing)
    pairing = open_pairs(base, tuned, include, exclude, partial=partial)
    run = _Run(pairing, settings, tasks)
    with _open_store(output, settings, resume, trust) as store:
        run.measure(store, workers, ray, budget, progress)
        table = to_frame(store.rows(run.done))
        sharing = to_frame(store.shared_rows(run.shared), SharedRow) if len(pairing.tuned) > 1 else None
    if table.empty and (pairing.bases or output is not None):
        raise InputError(run.nothing_measured())
    table = with_q_values(table)
    result = Comparison(table, run.summary(table, sharing, time.monotonic() - started), sharing)
    if output is not None:
        result.report(output)
    return result


class _Run:
    """The state of one comparison: what is paired, what is done."""

    def __init__(self, pairing: Pairing, settings: Settings, tasks: Sequence[str] | None) -> None:
        if tasks is not None and len(tasks) != len(pairing.tuned):
            raise InputError(
                f"{len(tasks)} task label(s) ({', '.join(tasks)}) for {len(pairing.tuned)} finetuned checkpoints; "
                "give one for each, in their order"
            )
        self.pairing = pairing
        self.settings = settings
        self.tasks = dict(zip(pairing.tuned, tasks or (), strict=False))
        self.done: list[tuple[str, str]] = []
        self.shared: list[tuple[Pair, str]] = []

    def measure(self, store: Store, workers: int, ray: str | None, budget: int | None, progress: bool) -> None:
        """Measure every pair that the store does not hold yet; the driver alone writes the store."""
        names = list(self.pairing.bases)
        tasks = [self._task(name, store, budget) for name in names]
        if ray is None and workers > 1:
            workers = affordable_workers(workers, tasks)
        if ray is None and budget is None:
            budget = free_memory(self.settings.device) // max(workers, 1)
            tasks = [replace(task, memory_budget=budget) for task in tasks]
        announce_row_blocks(tasks)
        with open_executor(workers, ray, threads=1, gpu=self.settings.device.startswith("cuda")) as executor:
            outcomes = measured(tasks, executor)
            for task, outcome in track(outcomes, "comparing", total=len(names), enabled=progress):
                self._take(task.before.name, outcome, store)
        order = {name: position for position, name in enumerate(names)}
        self.done.sort(key=lambda done: order[done[1]])
        self.shared.sort(key=lambda shared: order[shared[1]])

    def _task(self, name: str, store: Store, budget: int | None) -> MatrixTask:
        return MatrixTask(
            self.pairing.bases[name],
            self.pairing.partners[name],
            self.settings,
            self.pairing.base.source,
            store.contents(name),
            store.shared_contents(name),
            budget,
        )

    def _take(self, name: str, outcome: Outcome, store: Store) -> None:
        """Store what came of one matrix."""
        for label, (content, rows) in outcome.measured.items():
            if rows is not None:
                store.put(label, name, content, rows)
            self.done.append((label, name))
        for pair, (content, shared) in outcome.shared.items():
            if shared is not None:
                store.put_shared(pair, name, content, shared)
            self.shared.append((pair, name))
        for label, reason in outcome.skipped.items():
            record = self.pairing.skip if _is_same(reason) else self.pairing.fail
            record(label, name, reason)

    def nothing_measured(self) -> str:
        """Why the table is empty, for the person who asked."""
        base, skipped, tuned = self.pairing.base.source, self.pairing.skipped, ", ".join(self.pairing.tuned)
        alone = [group for groups in self.pairing.unpaired.values() for group in groups]
        if not self.pairing.bases:
            return f"no weight of {base} and {tuned} can be read: {describe_unpaired(alone)}"
        pairs = sum(map(len, self.pairing.partners.values()))
        same = sum(map(_is_same, skipped.values()))
        if same and same == pairs and not alone:
            rounded = " but for rounding" if any(reason.startswith(ROUNDED) for reason in skipped.values()) else ""
            return f"{base} and {tuned} hold the same weights{rounded}: there is no update to measure"
        if same and same == pairs:
            part = share_text(min(self.pairing.shares.values()))
            return (
                f"what {base} and {tuned} have in common is the same in both, but it is only {part} of the model; "
                f"not compared: {describe_unpaired(alone)}"
            )
        # Matrices that were tried say more than embeddings and heads, which nobody asked for.
        tried = [name for name in skipped if name.split(" [")[0] in self.pairing.bases]
        name = next(iter([*tried, *skipped]), "")
        return f"no matrix could be measured; {name}: {skipped[name]}" if name else "no matrix could be measured"

    def summary(self, table: pd.DataFrame, sharing: pd.DataFrame | None, seconds: float) -> dict[str, Any]:
        """The content of `summary.json`."""
        sources = {label: checkpoint.source for label, checkpoint in self.pairing.tuned.items()}
        return summarise(table, sharing, self.settings, self.pairing, sources, self.tasks, seconds)


def _is_same(reason: str) -> bool:
    """Whether a matrix was skipped because finetuning left it as it was."""
    return reason == UNCHANGED or reason.startswith(ROUNDED)


def _open_store(output: str | Path | None, settings: Settings, resume: bool, trust: bool) -> Store:
    """The store of the output folder, or one in memory."""
    known = {name: str(value) for name, value in asdict(settings).items()}
    if output is None:
        return Store(None, known, resume=False)
    claim_files(Path(output), *FILES, adopt=resume and trust)
    return Store(Path(output) / "store.sqlite", known, resume=resume, trust=trust)


def _check_device(device: str) -> None:
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={device!r} cannot be used here ({error}); pass device='cpu'") from error
