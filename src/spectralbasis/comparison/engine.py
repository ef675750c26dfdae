"""Compares checkpoints: pairs their matrices by name, has each pair measured, and sums up."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from spectralbasis.checkpoints import Checkpoint, Matrix, match_matrices, open_checkpoint
from spectralbasis.checkpoints.labels import short_labels
from spectralbasis.comparison.measuring import UNCHANGED, MatrixTask, Outcome, Settings, measure_matrix
from spectralbasis.comparison.planning import PROCESS_MEMORY, expected_k, working_memory
from spectralbasis.comparison.result import Comparison
from spectralbasis.comparison.rows import SharedRow, to_frame
from spectralbasis.comparison.sending import Parcel, measure_parcel, with_contents, with_places
from spectralbasis.comparison.sharing import Pair
from spectralbasis.comparison.statistics import with_q_values
from spectralbasis.comparison.store import Store
from spectralbasis.comparison.summary import summarise
from spectralbasis.errors import InputError
from spectralbasis.execution import Crew, Executor, Failure, open_executor
from spectralbasis.linalg import Leading, parse_leading
from spectralbasis.progress import track


def compare(
    base: Any,
    tuned: Sequence[Any],
    *,
    leading: Leading = 64,
    null: str | None = "scrambled",
    draws: int = 5,
    tasks: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    device: str = "cpu",
    trailing: bool = False,
    workers: int = 1,
    ray: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Comparison:
    """Measure what finetuning did to the leading singular vectors of a base model.

    Args:
        base: the pretrained checkpoint: a path, a hub id, a state dict, a module.
        tuned: one or more checkpoints finetuned from it; PEFT adapter folders are read over `base`.
        leading: number of leading directions: a whole number, a fraction of min(m, n), "mp" or "gd".
        null: "scrambled", "gaussian", or None for no draws (then nothing is tested).
        draws: draws of the null per matrix; 2 are needed for a z-score, 5 or more are sensible.
        tasks: what each of `tuned` was finetuned to, in their order; checkpoints of one task, as of several seeds, are
            the ceiling for what checkpoints of different tasks share.
        seed: of the draws and of the bootstrap.
        tolerance: largest sine accepted between computed and true leading subspaces.
        include: glob patterns of matrix names to measure; empty measures all but embeddings and heads.
        exclude: glob patterns of matrix names to leave out.
        device: where matrices are decomposed, such as "cpu" or "cuda".
        trailing: measure the trailing directions beside the leading ones; it takes a full decomposition each time.
        workers: processes that measure matrices side by side; the table does not depend on it.
        ray: address of a Ray cluster, "auto" for the one that this machine belongs to, or "local", in place of local
            processes; the table does not depend on it.
        output: folder for `comparison.parquet`, `summary.json`, `index.html` and the store; None writes nothing.
        resume: take over what an earlier run into `output` measured on the same weights with the same settings.
        progress: draw a progress bar on stderr.

    Raises:
        InputError: a checkpoint cannot be read, the models have no matrix in common or nothing changed between them,
            or the output folder cannot be used.
    """
    started = time.monotonic()
    settings = Settings(parse_leading(leading), null, draws, seed, tolerance, _usable_device(device), trailing)
    opened = open_checkpoint(base)
    checkpoints = [open_checkpoint(one, base=opened) for one in tuned]
    labels = short_labels([checkpoint.source for checkpoint in checkpoints])
    run = _Run(opened, dict(zip(labels, checkpoints, strict=True)), settings, tasks)
    run.match(include, exclude)
    with _open_store(output, settings, resume) as store:
        with open_executor(workers, ray, threads=1) as executor:
            run.measure(store, executor, progress)
        table = to_frame(store.rows(run.done))
        sharing = to_frame(store.shared_rows(run.shared), SharedRow) if len(run.tuned) > 1 else None
    if table.empty:
        raise InputError(run.nothing_measured())
    table = with_q_values(table)
    result = Comparison(table, run.summary(table, sharing, time.monotonic() - started), sharing)
    if output is not None:
        result.report(output)
    return result


class _Run:
    """The state of one comparison: checkpoints, matched pairs, what is done, what was skipped and why."""

    def __init__(
        self, base: Checkpoint, tuned: dict[str, Checkpoint], settings: Settings, tasks: Sequence[str] | None
    ) -> None:
        if not tuned:
            raise InputError("nothing to compare with: pass at least one finetuned checkpoint after the base")
        if tasks is not None and len(tasks) != len(tuned):
            raise InputError(
                f"{len(tasks)} task label(s) ({', '.join(tasks)}) for {len(tuned)} finetuned checkpoints; "
                "give one for each, in their order"
            )
        self.base = base
        self.tuned = tuned
        self.settings = settings
        self.bases: dict[str, Matrix] = {}
        self.partners: dict[str, dict[str, Matrix]] = {}
        self.skipped: dict[str, str] = {}
        self.tasks = dict(zip(tuned, tasks or (), strict=False))
        self.done: list[tuple[str, str]] = []
        self.shared: list[tuple[Pair, str]] = []

    def match(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Pair the matrices of the base with those of each finetuned checkpoint, by name."""
        for label, checkpoint in self.tuned.items():
            pairs, skipped = match_matrices(self.base, checkpoint, include=include, exclude=exclude)
            for name, reason in skipped.items():
                self._skip(label, name, reason)
            for before, after in pairs:
                self.bases[before.name] = before
                self.partners.setdefault(before.name, {})[label] = after

    def measure(self, store: Store, executor: Executor, progress: bool) -> None:
        """Measure every pair that the store does not hold yet; the driver alone writes the store."""
        outcomes = self._outcomes(store, Crew(executor))
        for name, outcome in track(outcomes, "comparing", total=len(self.bases), enabled=progress):
            self._take(name, outcome, store)
        order = {name: position for position, name in enumerate(self.bases)}
        self.done.sort(key=lambda done: order[done[1]])
        self.shared.sort(key=lambda shared: order[shared[1]])

    def _outcomes(self, store: Store, crew: "Crew[str]") -> Iterator[tuple[str, Outcome]]:
        """What comes of each matrix, as it comes."""
        waiting = deque(self.bases)
        pack: Callable[[MatrixTask], Parcel] = with_places
        while waiting or crew.keys:
            while waiting and crew.has_room:
                name = waiting.popleft()
                task = self._task(name, store)
                if crew.executor.travels:
                    crew.start(name, measure_parcel, pack(task), memory=self._memory(task))
                else:
                    crew.start(name, measure_matrix, task)
            for name, found in crew.finished():
                if found is None:  # where it was to be measured, the files cannot be seen
                    pack = with_contents
                    waiting.appendleft(name)
                else:
                    yield name, self._outcome(name, found)

    def _outcome(self, name: str, found: Outcome | Failure) -> Outcome:
        if isinstance(found, Failure):
            return Outcome(skipped=dict.fromkeys(self.partners[name], found.reason))
        return found

    def _memory(self, task: MatrixTask) -> int:
        """Bytes that the worker of a task needs."""
        k = expected_k(self.settings.leading, task.before.shape)
        return PROCESS_MEMORY + working_memory(*task.before.shape, k, trailing=self.settings.trailing)

    def _task(self, name: str, store: Store) -> MatrixTask:
        return MatrixTask(
            self.bases[name],
            self.partners[name],
            self.settings,
            self.base.source,
            store.contents(name),
            store.shared_contents(name),
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
            self._skip(label, name, reason)

    def _skip(self, label: str, name: str, reason: str) -> None:
        """Record a reason under the matrix's name, with the checkpoint where several are compared."""
        self.skipped[name if len(self.tuned) == 1 else f"{name} [{label}]"] = reason

    def nothing_measured(self) -> str:
        """Why the table is empty, for the person who asked."""
        if UNCHANGED in self.skipped.values():
            return (
                f"{self.base.source} and {', '.join(self.tuned)} hold the same weights: there is no update to measure"
            )
        # Matrices that were tried say more than embeddings and heads, which nobody asked for.
        tried = [name for name in self.skipped if name.split(" [")[0] in self.bases]
        name = next(iter([*tried, *self.skipped]), "")
        return f"no matrix could be measured; {name}: {self.skipped[name]}" if name else "no matrix could be measured"

    def summary(self, table: pd.DataFrame, sharing: pd.DataFrame | None, seconds: float) -> dict[str, Any]:
        """The content of `summary.json`."""
        sources = {label: checkpoint.source for label, checkpoint in self.tuned.items()}
        return summarise(table, sharing, self.settings, self.base.source, sources, self.tasks, self.skipped, seconds)


def _open_store(output: str | Path | None, settings: Settings, resume: bool) -> Store:
    """The store of the output folder, or one in memory."""
    known = {name: str(value) for name, value in asdict(settings).items()}
    if output is None:
        return Store(None, known, resume=False)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror}; choose another output folder") from error
    return Store(Path(output) / "store.sqlite", known, resume=resume)


def _usable_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={device!r} cannot be used here ({error}); pass device='cpu'") from error
    return device
