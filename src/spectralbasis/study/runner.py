"""Do the planned runs that the store lacks, in parallel, and plan again after each result."""

import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spectralbasis.errors import BusyError, InputError
from spectralbasis.execution import Crew, Executor, Failure, describe, open_executor, out_of_memory
from spectralbasis.files import atomic_folder, came_of_no_room, not_ours
from spectralbasis.study.actions import find_action
from spectralbasis.study.runs import Outcome, Results, Run, RunStore, Site, with_needs
from spectralbasis.version import library_versions

ARTEFACTS = "artefacts"

Plan = Callable[[Results], Iterable[Run]]


class Watcher(Protocol):
    """Is told of the progress of a study."""

    def finished(self, run: Run, seconds: float, error: str | None) -> None:
        """A run is done, or failed for the reason given."""

    def planned(self, missing: Iterable[Run], done: int, at_once: int) -> None:
        """So many runs are done, and these are not, of which so many go at once; called whenever the plan changes."""


@dataclass(frozen=True)
class _Done:
    """What a worker sends back: an outcome or an error, never an exception that might not travel.

    `no_room` and `busy` say that the disk was full, or that the worker of a killed study still wrote this run: neither
    is the run's fault.
    """

    outcome: Outcome | None
    error: str
    seconds: float
    versions: Mapping[str, Any]
    no_room: bool = False
    busy: bool = False


def run_all(
    plan: Plan,
    store: RunStore,
    *,
    data: Path | None,
    jobs: int = 1,
    ray: str | None = None,
    watcher: Watcher | None = None,
) -> None:
    """Do what the plan wants and the store does not have, until the plan wants nothing new.

    Args:
        plan: what is wanted, in order of preference, given what is known; called again after each run.
        store: where results are kept; this process alone writes it.
        data: the folder of all data sets, or None.
        jobs: how many runs go side by side, each in a process of its own; 1 runs here.
        ray: address of a Ray cluster that sees the same folders, "auto" or "local", instead of local processes.
        watcher: is told of the progress.

    Raises:
        InputError: the store cannot be written, the disk is full, another process writes a run, or jobs is below 1.
    """
    with open_executor(jobs, ray) as executor:
        runner = _Runner(plan, store, data, executor, watcher)
        runner.submit()
        while finished := runner.crew.finished():
            for run, done in finished:
                runner.record(run, done)
            runner.submit()


class _Runner:
    """The state of one call."""

    def __init__(
        self, plan: Plan, store: RunStore, data: Path | None, executor: Executor, watcher: Watcher | None
    ) -> None:
        self.plan = plan
        self.store = store
        self.data = data
        self.watcher = watcher
        self.artefacts = store.folder.absolute() / ARTEFACTS  # workers may run in another folder
        self.crew: Crew[Run] = Crew(executor)

    def submit(self) -> None:
        """Start as many runs as there is room for."""
        for run in self._missing():
            if not self.crew.has_room:
                break
            ready = all(
                self.store.results.get(need) is not None and self._folder(need).is_dir() for need in run.needs.values()
            )
            if run in self.crew.keys or not ready:
                continue
            needs = {role: self._folder(need) for role, need in run.needs.items()}
            self.crew.start(run, perform, run, self._folder(run), self.data, needs)

    def _missing(self) -> list[Run]:
        """The runs to do, needs first: those wanted, and finished ones whose folder a run to do needs but is gone."""
        results = self.store.results
        wanted = list(self.plan(results))
        missing: list[Run] = []
        seen: set[Run] = set()

        def visit(run: Run, folder_is_needed: bool) -> None:
            done = results.get(run) is not None and (self._folder(run).is_dir() or not folder_is_needed)
            if run in seen or done or any(results.error(one) is not None for one in with_needs([run])):
                return
            seen.add(run)
            for need in run.needs.values():
                visit(need, folder_is_needed=True)
            missing.append(run)

        for run in wanted:
            visit(run, folder_is_needed=False)
        if self.watcher:
            done = sum(results.get(run) is not None for run in set(with_needs(wanted)))
            self.watcher.planned(missing, done, self.crew.executor.workers)
        self._clear(wanted)
        return missing

    def _folder(self, run: Run) -> Path:
        return self.artefacts / run.key

    def record(self, run: Run, done: "_Done | Failure") -> None:
        if isinstance(done, Failure):
            done = _Done(None, done.reason, 0.0, library_versions())
        if done.no_room:
            raise InputError(
                f"the disk of {self.artefacts.parent} is full, so {run} could not be stored; free some space and run "
                "the same command again: finished runs are kept"
            )
        if done.busy:
            raise InputError(
                f"{run} is being written by another process, as a worker of a study that was killed; wait until it has "
                "ended, or end it, and run the same command again: finished runs are kept"
            )
        if done.outcome is None:
            self.store.put_error(run, done.error, done.seconds, done.versions)
        else:
            self.store.put(run, done.outcome, done.seconds, done.versions)
        if self.watcher:
            self.watcher.finished(run, done.seconds, done.error or None)

    def _clear(self, wanted: Iterable[Run]) -> None:
        """Remove the folders of runs that no wanted run needs."""
        needed = {need.key for run in with_needs(wanted) for need in run.needs.values()}
        busy = {run.key for run in self.crew.keys}
        for folder in self.artefacts.glob("*"):
            if folder.name not in needed | busy and not folder.is_symlink() and not_ours(folder) == []:
                shutil.rmtree(folder, ignore_errors=True)


def perform(run: Run, folder: Path, data: Path | None, needs: Mapping[str, Path]) -> _Done:
    """Do one run; its folder appears whole, when it has succeeded. Runs in a worker."""
    started = time.monotonic()
    try:
        with atomic_folder(folder) as fresh:
            outcome = find_action(run.action)(run, Site(data, fresh, needs))
    except Exception as error:
        if out_of_memory(error):
            raise
        seconds = time.monotonic() - started
        busy = isinstance(error, BusyError)
        return _Done(None, describe(error), seconds, _made_with(), came_of_no_room(error), busy)
    return _Done(outcome, "", time.monotonic() - started, _made_with())


def _made_with() -> dict[str, Any]:
    """Versions, and what else of a machine a result may depend on."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **library_versions(),
        "threads": torch.get_num_threads(),
        "device": device,
        "machine": platform.machine(),
        "system": sys.platform,
    }
