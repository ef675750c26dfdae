"""Conduct a study: do the runs of its experiments, analyse them, and write the results."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from spectralbasis.errors import InputError
from spectralbasis.extras import require_extra
from spectralbasis.files import claim_files
from spectralbasis.printable import shortened
from spectralbasis.report import write_study_report
from spectralbasis.report.study_page import FIGURES, OVERVIEW, RESULTS
from spectralbasis.study.claims import Experiment
from spectralbasis.study.experiments import EXPERIMENTS, find_experiment
from spectralbasis.study.pages import Part, write_pages
from spectralbasis.study.runner import run_all
from spectralbasis.study.runs import Results, Run, RunStore, Timing, with_needs

ALL = "all"
QUICK = "quick"


def study(
    name: str = ALL,
    *,
    preset: str = "cpu",
    data: str | Path | None = None,
    output: str | Path,
    jobs: int = 1,
    ray: str | None = None,
    retry: bool = False,
    analyse_only: bool = False,
    trust: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Conduct one experiment or all, and write what they show to the folder `output`.

    Every run is a row in `runs.sqlite` and done once: given again, the command goes on where it was stopped, and a
    folder that holds only the exported `runs.parquet` and `measurements.parquet` goes on from those with `trust`.
    Returns the content of `results.json`.

    Args:
        name: of an experiment; "all"; or "quick", all with the preset "quick".
        preset: "quick", "cpu" or "paper".
        data: folder with the data sets, each in a folder of its own.
        output: the folder of the study.
        jobs: runs side by side.
        ray: address of a Ray cluster; see `run_all`.
        retry: try again what failed.
        analyse_only: start no run; analyse those that are there.
        trust: build also on runs that another user or machine stored, and on exported rows; see `RunStore`.
        progress: show what is done, what is left, and about how long it will take.

    Raises:
        InputError: a name is not known, the data are absent, the folder cannot be used, or the extra `study` is not
            installed.
    """
    require_extra("study", "the study")
    if name == QUICK:
        name, preset = ALL, QUICK
    if data is not None and not Path(data).is_dir():
        raise InputError(f"the data folder {data} does not exist; pass --data with the folder that holds the data sets")
    chosen = list(EXPERIMENTS.values()) if name == ALL else [find_experiment(name)]
    for experiment in chosen:
        if preset not in experiment.presets:
            raise InputError(f"{experiment.name} has no preset {preset!r}; it has {', '.join(experiment.presets)}")

    def plan(results: Results) -> list[Run]:
        return [run for experiment in chosen for run in experiment.plan(experiment.presets[preset], results)]

    pages = (f"{experiment.name}.md" for experiment in chosen)
    claim_files(Path(output), RESULTS, FIGURES, OVERVIEW, "index.html", *pages, adopt=trust)
    with RunStore(Path(output), trust=trust) as store:
        if retry:
            store.forget_errors()
        try:
            if not analyse_only:
                with _Progress(store, progress) as watcher:
                    place = None if data is None else Path(data).absolute()
                    run_all(plan, store, data=place, jobs=jobs, ray=ray, watcher=watcher)
        finally:
            store.export()
        parts = [_part(experiment, experiment.presets[preset], store) for experiment in chosen]
    content = write_pages(Path(output), preset, parts)
    write_study_report(output)
    return content


def _part(experiment: Experiment, settings: Any, store: RunStore) -> Part:
    results = store.results
    runs = list(with_needs(experiment.plan(settings, results)))
    finished = [record for run in runs if (record := results.get(run)) is not None]
    return Part(
        name=experiment.name,
        title=experiment.title or experiment.name.capitalize(),
        question=experiment.question,
        planned=len(runs),
        finished=len(finished),
        failed={f"{run} ({run.key})": error for run in runs if (error := results.error(run)) is not None},
        seconds=sum(record.seconds for record in finished),
        devices=Counter(str(record.versions.get("device", "cpu")) for record in finished),
        findings=experiment.analyse(settings, results),
    )


_LONGEST_LINE = 4000


class _Progress:
    """A bar where stderr is a terminal, else a line for every finished run."""

    def __init__(self, store: RunStore, enabled: bool) -> None:
        self.store = store
        self.enabled = enabled
        self.console = Console(stderr=True, soft_wrap=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, console=self.console, disable=not (enabled and self.console.is_terminal))
        self.task = self.bar.add_task("planning", total=None)
        self.done, self.missing = 0, 0
        self.left = ""

    def planned(self, missing: Iterable[Run], done: int, at_once: int) -> None:
        """See `Watcher`."""
        runs = list(missing)
        self.done, self.missing = done, len(runs)
        self.left = time_left(runs, self.store.timings, at_once)
        self.bar.update(self.task, completed=done, total=done + len(runs), description=f"runs, {self.left} to go")

    def finished(self, run: Run, seconds: float, error: str | None) -> None:
        """See `Watcher`."""
        if not self.enabled:
            return
        if error:
            self.console.print(shortened(f"failed: {run}: {error}", _LONGEST_LINE), markup=False)
        elif not self.console.is_terminal:
            total = self.done + self.missing
            line = f"{self.done + 1}/{total} {run}: {seconds:.0f} s; {self.left} to go"
            self.console.print(shortened(line, _LONGEST_LINE), markup=False)

    def __enter__(self) -> "_Progress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


def time_left(missing: Sequence[Run], timings: Sequence[Timing], at_once: int) -> str:
    """About how long the missing runs will take, each by the median of the earlier ones that are most like it."""
    known: dict[tuple[str, ...], list[float]] = {}
    for timing in timings:
        for length in range(len(timing.kind) + 1):
            known.setdefault(timing.kind[:length], []).append(timing.seconds)
    if not known:
        return "an unknown time"

    @cache
    def typical(kind: tuple[str, ...]) -> float:
        return statistics.median(known[kind]) if kind in known else typical(kind[:-1])

    minutes = sum(typical(run.kind) for run in missing) / at_once / 60
    return f"about {minutes / 60:.1f} h" if minutes >= 90 else f"about {minutes:.0f} min"
