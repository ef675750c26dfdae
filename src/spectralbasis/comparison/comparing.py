"""Compare checkpoints: pair their matrices by name, measure each pair, summarise, and write the results."""

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralbasis.checkpoints.matching import describe_unpaired, share_text
from spectralbasis.comparison.distributing import check_device, outcomes
from spectralbasis.comparison.measuring import ROUNDED, UNCHANGED, MatrixTask, Settings
from spectralbasis.comparison.metrics import SharedRow, to_frame
from spectralbasis.comparison.nulls import Null, parse_null
from spectralbasis.comparison.pairing import Pairing, open_pairs
from spectralbasis.comparison.sharing import Pair
from spectralbasis.comparison.statistics import with_q_values
from spectralbasis.comparison.store import Store
from spectralbasis.comparison.summary import summarise
from spectralbasis.errors import InputError
from spectralbasis.files import atomic_path, claim_files
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.printable import track
from spectralbasis.sizes import parse_size
from spectralbasis.triplets import check_tolerance

if TYPE_CHECKING:
    import pandas as pd

FILES = ("comparison.parquet", "sharing.parquet", "summary.json", "index.html")
"""What `compare` writes into its output folder, beside the store."""


def compare(
    base: Any,
    tuned: Sequence[Any],
    *,
    leading: Leading = "auto",
    null: str | Null | None = "scrambled",
    draws: int | None = None,
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
) -> "Comparison":
    """Measure what finetuning did to the leading singular vectors of a base model.

    Args:
        base: the pretrained checkpoint: a path, a hub id, a state dict, a module.
        tuned: one or more checkpoints finetuned from it; PEFT adapter folders are read over `base`.
        leading: number of leading directions: a whole number (all directions of a matrix that has fewer), a fraction
            of min(m, n), "mp", "gd", or "auto" for 64, or half of min(m, n) where that is less.
        null: "scrambled", "scrambled-left", "scrambled-right", "energy", "gaussian" (docs/mathematics.md), or a record
            of your own (`comparison.nulls.Null`); None for no null, and then nothing is tested.
        draws: draws of the null per matrix; 2 are needed for a z-score, 5 or more are sensible. None: the closed form
            of the null, exact for coverage, for the overlap in each matrix where the null has one that is within 5 % of
            many draws (docs/mathematics.md), and 5 draws of the overlap elsewhere. The column `null_from` says which.
        tasks: the task of each of `tuned`, in their order; checkpoints of one task (several seeds) are the ceiling for
            what checkpoints of different tasks share.
        seed: of the draws and of the bootstrap.
        tolerance: largest sine accepted between computed and true leading subspaces.
        include: glob patterns of matrix names to measure; empty measures all but embeddings and heads.
        exclude: glob patterns of matrix names to leave out.
        partial: compare an adapter also where the base lacks some of what it adapts, which is listed as skipped.
        device: where matrices are decomposed, such as "cpu" or "cuda".
        trailing: measure the trailing directions too; each takes a full decomposition.
        workers: processes that measure matrices at the same time; fewer start where memory is short. The table does not
            depend on it.
        ray: address of a Ray cluster, "auto" for the one that this machine belongs to, or "local", in place of local
            processes. The table does not depend on it.
        memory_budget: bytes, or text such as "8GB", that each process may work in: a matrix that takes more is read
            from its file in row blocks, and the table is the same except for the rounding of float32. None: the memory
            that is free, divided among the processes; no limit on a Ray cluster.
        output: folder for `comparison.parquet`, `summary.json`, `index.html` and the store; None writes nothing.
        resume: use what an earlier run into `output` measured on the same weights with the same settings.
        trust: with `resume`, use also what another user or machine stored in `output`; see `Store`.
        progress: draw a progress bar on stderr.

    Returns:
        The comparison. Where no weight of either side can be read (both are quantized in a way that is not decoded),
        its table is empty, its verdicts are "undecided" and `unpaired` of its summary says why.

    Raises:
        InputError: a checkpoint cannot be read, the models have no matrix in common or nothing changed between them,
            the memory budget is malformed, or the output folder cannot be used.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> generator = torch.Generator().manual_seed(0)
        >>> W0 = torch.randn(24, 16, generator=generator)
        >>> W1 = W0 + 0.1 * torch.randn(24, 16, generator=generator)
        >>> found = sb.compare({"layer.0.dense.weight": W0}, [{"layer.0.dense.weight": W1}], leading=4)
        >>> overlaps = found.table[(found.table.metric == "subspace_overlap") & (found.table.k == 4)]
        >>> bool(overlaps.value.between(0, 1).all()), list(overlaps.side)
        (True, ['left', 'right'])
        >>> found.summary()["stability"]["verdict"]
        'undecided'
    """
    started = time.monotonic()
    budget = None if memory_budget is None else parse_size(memory_budget)
    if ray is None:
        check_device(device)
    check_tolerance(tolerance)
    settings = Settings(parse_leading(leading), parse_null(null), draws, seed, tolerance, device, trailing)
    pairing = open_pairs(base, tuned, include, exclude, partial=partial)
    if tasks is not None and len(tasks) != len(pairing.tuned):
        raise InputError(
            f"{len(tasks)} task label(s) ({', '.join(tasks)}) for {len(pairing.tuned)} finetuned checkpoints; "
            "give one for each, in their order"
        )
    store_file = None
    if output is not None:
        claim_files(Path(output), *FILES, adopt=resume and trust)
        store_file = Path(output) / "store.sqlite"
    known = {setting.name: str(getattr(settings, setting.name)) for setting in fields(settings)}
    with Store(store_file, known, resume=resume and output is not None, trust=trust) as store:
        done, shared = _measure(pairing, settings, store, workers, ray, budget, progress)
        table = to_frame(store.rows(done))
        sharing = to_frame(store.shared_rows(shared), SharedRow) if len(pairing.tuned) > 1 else None
    if table.empty and (pairing.bases or output is not None):
        raise InputError(_nothing_measured(pairing))
    table = with_q_values(table)
    labels = dict(zip(pairing.tuned, tasks or (), strict=False))
    summary = summarise(table, sharing, settings, pairing, labels, time.monotonic() - started)
    result = Comparison(table, summary, sharing)
    if output is not None:
        result.report(output)
    return result


@dataclass(frozen=True)
class Comparison:
    """Results of `compare`.

    Attributes:
        table: one row per measurement; the columns are the fields of `comparison.metrics.Row`, and `q_value`.
        sharing: the same between every two finetuned checkpoints (`comparison.metrics.SharedRow`); None where there is
            only one.

    Examples:
        >>> import torch
        >>> import spectralbasis as sb
        >>> W0 = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
        >>> base, tuned = {"layer.0.dense.weight": W0}, {"layer.0.dense.weight": W0 + 0.1}
        >>> found = sb.compare(base, [tuned], leading=4, draws=2)
        >>> round(float(found.table[found.table.metric == "update_norm_relative"].value.iloc[0]), 1)
        0.1
        >>> found.summary()["matrices"], found.summary()["null"], found.summary()["draws"]
        (1, 'scrambled', 2)
    """

    table: "pd.DataFrame"
    _summary: dict[str, Any]
    sharing: "pd.DataFrame | None" = None

    def summary(self) -> dict[str, Any]:
        """Verdicts with their intervals, settings, versions: the content of `summary.json`."""
        return self._summary

    def save(self, directory: str | Path) -> None:
        """Write `comparison.parquet`, `summary.json` and, of several checkpoints, `sharing.parquet` into a folder."""
        folder = Path(directory)
        claim_files(folder, "comparison.parquet", "summary.json", "sharing.parquet")
        tables = {"comparison.parquet": self.table, "sharing.parquet": self.sharing}
        # All are written before the first takes its place: a full disk leaves the files of an earlier run together.
        with ExitStack() as files:
            for name, table in tables.items():
                if table is not None:
                    file = files.enter_context(atomic_path(folder / name))
                    table.to_parquet(file, index=False, write_page_checksum=True)
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


def _measure(
    pairing: Pairing,
    settings: Settings,
    store: Store,
    workers: int,
    ray: str | None,
    budget: int | None,
    progress: bool,
) -> tuple[list[tuple[str, str]], list[tuple[Pair, str]]]:
    """Measure every pair that the store does not hold yet; only this process writes the store.

    Returns:
        (label, matrix) of everything that was measured, and (two labels, matrix) of what was measured between finetuned
        checkpoints, both in the order of the matrices.
    """
    tasks = [
        MatrixTask(
            matrix,
            pairing.partners[name],
            settings,
            pairing.base.source,
            store.contents(name),
            store.shared_contents(name),
            budget,
        )
        for name, matrix in pairing.bases.items()
    ]
    done: list[tuple[str, str]] = []
    shared: list[tuple[Pair, str]] = []
    with outcomes(tasks, workers=workers, ray=ray, budget=budget, device=settings.device) as running:
        for task, outcome in track(running, "comparing", total=len(tasks), enabled=progress):
            name = task.before.name
            for label, (content, rows) in outcome.measured.items():
                if rows is not None:
                    store.put(label, name, content, rows)
                done.append((label, name))
            for pair, (content, shared_rows) in outcome.shared.items():
                if shared_rows is not None:
                    store.put_shared(pair, name, content, shared_rows)
                shared.append((pair, name))
            for label, reason in outcome.skipped.items():
                (pairing.skip if _is_same(reason) else pairing.fail)(label, name, reason)
    order = {name: position for position, name in enumerate(pairing.bases)}
    return sorted(done, key=lambda one: order[one[1]]), sorted(shared, key=lambda one: order[one[1]])


def _nothing_measured(pairing: Pairing) -> str:
    """Why the table is empty, for the person who asked."""
    base, skipped, tuned = pairing.base.source, pairing.skipped, ", ".join(pairing.tuned)
    alone = [group for groups in pairing.unpaired.values() for group in groups]
    if not pairing.bases:
        return f"no weight of {base} and {tuned} can be read: {describe_unpaired(alone)}"
    if sum(map(_is_same, skipped.values())) == sum(map(len, pairing.partners.values())):
        if alone:
            part = share_text(min(pairing.shares.values()))
            return (
                f"the matrices that {base} and {tuned} share are equal in both, but they are only {part} of the "
                f"model; not compared: {describe_unpaired(alone)}"
            )
        rounded = " apart from rounding" if any(reason.startswith(ROUNDED) for reason in skipped.values()) else ""
        return f"{base} and {tuned} hold the same weights{rounded}: there is no update to measure"
    # Matrices that were tried say more than embeddings and heads, which nobody asked for.
    tried = [name for name in skipped if name.split(" [")[0] in pairing.bases]
    name = next(iter([*tried, *skipped]), "")
    return f"no matrix could be measured; {name}: {skipped[name]}" if name else "no matrix could be measured"


def _is_same(reason: str) -> bool:
    """Whether a matrix was skipped because finetuning left it as it was."""
    return reason == UNCHANGED or reason.startswith(ROUNDED)
