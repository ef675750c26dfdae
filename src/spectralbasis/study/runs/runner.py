"""Does the runs that a plan asks for and the store lacks, side by side, and plans again as results come in."""

import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spectralbasis.errors import SpectralBasisError
from spectralbasis.execution import Workers
from spectralbasis.study.actions import find_action
from spectralbasis.study.results import library_versions
from spectralbasis.study.runs.run import Outcome, Results, Run, Site, with_needs
from spectralbasis.study.runs.store import RunStore

ARTEFACTS = "artefacts"
ATTEMPTS = 2
"""How often a run is tried whose worker dies."""

Plan = Callable[[Results], Iterable[Run]]


class Watcher(Protocol):
    """Hears of the progress of a study."""

    def finished(self, run: Run, seconds: float, error: str | None) -> None:
        """A run is done, or failed for the reason given."""

    def planned(self, missing: Iterable[Run], done: int) -> None:
        """So many runs are done, and these are not; called whenever the plan changes."""


@dataclass(frozen=True)
class _Done:
    """What a worker sends back: an outcome or an error, never an exception that might not travel."""

    outcome: Outcome | None
    error: str
    seconds: float
    versions: Mapping[str, Any]


def run_all(
    plan: Plan,
    store: RunStore,
    *,
    data: Path | None,
    jobs: int = 1,
    ray: str | None = None,
    watcher: Watcher | None = None,
) -> None:
    """Do what the plan wants and the store lacks, until the plan wants nothing new.

    Args:
        plan: what is wanted, in order of preference, given what is known; called again after each run.
        store: where results are kept; this process alone writes it.
        data: the folder of all data sets, or None.
        jobs: how many runs go side by side, each in a process of its own; 1 runs here.
        ray: address of a Ray cluster that sees the same folders, "auto" or "local", instead of local processes.
        watcher: hears of the progress.

    Raises:
        InputError: the store cannot be written, or jobs is below 1.
    """
    with Workers(jobs, ray) as workers:
        _Runner(plan, store, data, workers, watcher).go()


class _Runner:
    """The state of one call: what is under way, what died how often."""

    def __init__(
        self, plan: Plan, store: RunStore, data: Path | None, workers: Workers, watcher: Watcher | None
    ) -> None:
        self.plan = plan
        self.store = store
        self.data = data
        self.workers = workers
        self.watcher = watcher
        self.under_way: dict[Future[_Done], Run] = {}
        self.deaths: dict[Run, int] = {}

    def go(self) -> None:
        """Submit, wait, record, until nothing is left to do."""
        try:
            while self._submit() or self.under_way:
                finished, _ = wait(self.under_way, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._record(self.under_way.pop(future), future)
        finally:
            self.workers.shutdown(wait=False, cancel_futures=True)  # where an error or Ctrl-C ends it

    def _submit(self) -> bool:
        """Start as many runs as there is room for; says whether any was started."""
        started = False
        # After a death nobody knows whose fault it was: those under way are tried again one at a time.
        missing = self._missing()
        suspects = [run for run in missing if run in self.deaths]
        for run in suspects or missing:
            if len(self.under_way) >= (1 if suspects else self.workers.jobs):
                break
            if run in self.under_way.values() or not all(self._is_usable(need) for need in run.needs.values()):
                continue
            needs = {role: self._folder(need) for role, need in run.needs.items()}
            self.under_way[self.workers.submit(perform, run, self._folder(run), self.data, needs)] = run
            started = True
        return started

    def _missing(self) -> list[Run]:
        """The runs to do, needs first: those wanted, and finished ones whose folder a run to do needs but is gone."""
        results = self.store.results
        wanted = list(self.plan(results))
        missing: list[Run] = []
        seen: set[Run] = set()

        def visit(run: Run, folder_is_needed: bool) -> None:
            done = results.get(run) is not None and (self._folder(run).is_dir() or not folder_is_needed)
            if run in seen or done or self._is_hopeless(run):
                return
            seen.add(run)
            for need in run.needs.values():
                visit(need, folder_is_needed=True)
            missing.append(run)

        for run in wanted:
            visit(run, folder_is_needed=False)
        if self.watcher:
            done = sum(results.get(run) is not None for run in set(with_needs(wanted)))
            self.watcher.planned(missing, done)
        self._clear(wanted)
        return missing

    def _is_hopeless(self, run: Run) -> bool:
        """The run failed, or one that it needs."""
        return any(self.store.results.error(one) is not None for one in with_needs([run]))

    def _is_usable(self, run: Run) -> bool:
        return self.store.results.get(run) is not None and self._folder(run).is_dir()

    def _folder(self, run: Run) -> Path:
        return self.store.folder / ARTEFACTS / run.key

    def _record(self, run: Run, future: "Future[_Done]") -> None:
        try:
            done = future.result()
        except Exception as error:  # what the run itself raised comes back as its outcome
            self.workers.restart()
            self.deaths[run] = self.deaths.get(run, 0) + 1
            if self.deaths[run] < ATTEMPTS:
                return
            reason = f"its process died {ATTEMPTS} times, as for lack of memory ({error}); run fewer side by side"
            done = _Done(None, reason, 0.0, library_versions())
        if done.outcome is None:
            self.store.put_error(run, done.error, done.seconds, done.versions)
        else:
            self.store.put(run, done.outcome, done.seconds, done.versions)
        if self.watcher:
            self.watcher.finished(run, done.seconds, done.error or None)

    def _clear(self, wanted: Iterable[Run]) -> None:
        """Remove the folders of runs that no wanted run needs."""
        needed = {need.key for run in with_needs(wanted) for need in run.needs.values()}
        busy = {run.key for run in self.under_way.values()}
        for folder in (self.store.folder / ARTEFACTS).glob("*"):
            if folder.name not in needed | busy and not folder.name.startswith("."):
                shutil.rmtree(folder, ignore_errors=True)


def perform(run: Run, folder: Path, data: Path | None, needs: Mapping[str, Path]) -> _Done:
    """Do one run; its folder appears whole, when it has succeeded. Runs in a worker."""
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        try:
            outcome = find_action(run.action)(run, Site(data, fresh, needs))
        except Exception as error:
            return _Done(None, _reason(error), time.monotonic() - started, _made_with())
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return _Done(outcome, "", time.monotonic() - started, _made_with())


def _reason(error: Exception) -> str:
    """Why a run failed; where nobody foresaw it, with the place in the code."""
    if isinstance(error, SpectralBasisError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}"


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
