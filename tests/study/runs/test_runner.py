"""The runner does what is wanted and missing, each run once, whatever dies in between."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectralbasis import execution
from spectralbasis.errors import InputError
from spectralbasis.files import scratch_beside
from spectralbasis.study.runner import ARTEFACTS, run_all
from spectralbasis.study.runs import Results, Run, RunStore

ACTION = "tests.study.runs.planted:act"


def planted(value: int, calls: Path | None = None, seed: int = 0, needs: dict[str, Run] | None = None, **more) -> Run:
    settings = {"value": value, **more} | ({} if calls is None else {"calls": str(calls)})
    return Run(ACTION, settings, seed, needs or {})


def do(folder: Path, *runs: Run, jobs: int = 1) -> Results:
    with RunStore(folder) as store:
        run_all(lambda _: runs, store, data=None, jobs=jobs)
        return store.results


def calls_of(file: Path) -> list[str]:
    return file.read_text().split()


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_gets_the_folders_of_what_it_needs(tmp_path, jobs):
    base = planted(1)
    sums = [planted(10 * i, needs={"a": base, "b": planted(5)}) for i in range(3)]
    results = do(tmp_path, *sums, jobs=jobs)
    assert [results.get(run).result["total"] for run in sums] == [6, 16, 26]
    assert results.get(base).result["total"] == 1


def test_what_is_done_is_not_done_again(tmp_path):
    calls = tmp_path / "calls"
    run, later = planted(1, calls), planted(2, calls)
    do(tmp_path / "study", run)
    results = do(tmp_path / "study", run, later)
    assert calls_of(calls) == [run.key, later.key]
    assert results.get(run).result["total"] == 1


def test_the_plan_may_depend_on_what_came_out(tmp_path):
    first = planted(3)

    def plan(results: Results) -> list[Run]:
        record = results.get(first)
        return [first] if record is None else [first, planted(record.result["total"] * 2)]

    with RunStore(tmp_path) as store:
        run_all(plan, store, data=None)
        assert store.results.get(planted(6)).result["total"] == 6


def test_folders_are_kept_only_while_a_planned_run_needs_them(tmp_path):
    base = planted(1)
    leaf = planted(2, needs={"base": base})
    do(tmp_path, leaf)
    assert [folder.name for folder in (tmp_path / ARTEFACTS).iterdir()] == [base.key]
    do(tmp_path, planted(7))
    assert not list((tmp_path / ARTEFACTS).iterdir())


def test_a_folder_that_is_gone_is_made_again_for_who_needs_it(tmp_path):
    calls = tmp_path / "calls"
    base = planted(1, calls)
    study = tmp_path / "study"
    do(study, base)
    results = do(study, planted(2, needs={"base": base}))
    assert calls_of(calls) == [base.key, base.key]
    assert results.get(planted(2, needs={"base": base})).result["total"] == 3


@pytest.mark.parametrize(
    ("more", "reason"), [({"refuses": "no such task"}, "no such task"), ({"breaks": "x"}, "KeyError")]
)
def test_a_run_that_fails_fails_alone(tmp_path, more, reason):
    bad = planted(1, **more)
    on_top, good = planted(2, needs={"base": bad}), planted(3)
    results = do(tmp_path, bad, on_top, good)
    assert reason in results.error(bad)
    assert results.get(bad) is None
    assert results.get(on_top) is None
    assert results.get(good).result["total"] == 3


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_no_fault_of_a_run(tmp_path, jobs):
    full = tmp_path / "full"
    full.touch()
    first, second = planted(1), planted(2, full=str(full))
    with pytest.raises(InputError, match=r"is full, .* run the same command again: finished runs are kept"):
        do(tmp_path / "study", first, second, jobs=jobs)
    full.unlink()
    results = do(tmp_path / "study", first, second, jobs=jobs)
    assert [results.get(run).result["total"] for run in (first, second)] == [1, 2]


def test_a_run_that_a_killed_studys_worker_still_writes_has_not_failed(tmp_path):
    first, second = planted(1), planted(2)
    place = tmp_path / "study" / ARTEFACTS / second.key
    with scratch_beside(place), pytest.raises(InputError, match="written by another process, as a worker of a study"):
        do(tmp_path / "study", first, second)
    results = do(tmp_path / "study", first, second)
    assert [results.get(run).result["total"] for run in (first, second)] == [1, 2]


def test_failed_runs_are_tried_again_only_when_asked(tmp_path):
    calls = tmp_path / "calls"
    bad = planted(1, calls, refuses="no")
    do(tmp_path / "study", bad)
    do(tmp_path / "study", bad)
    assert len(calls_of(calls)) == 1
    with RunStore(tmp_path / "study") as store:
        store.forget_errors()
        run_all(lambda _: [bad], store, data=None)
    assert len(calls_of(calls)) == 2


def test_a_worker_that_dies_costs_no_other_run(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "START_METHOD", "fork")  # many start, and what they do needs no threads
    fragile, hopeless = (planted(deaths, tmp_path / "calls", dies=deaths) for deaths in (1, 9))
    others = [planted(value) for value in range(2, 5)]
    results = do(tmp_path / "study", fragile, hopeless, *others, jobs=2)
    assert [results.get(run).result["total"] for run in (fragile, *others)] == [1, 2, 3, 4]
    assert (
        "tried 3 times, the last time with no other task running: its process ended with exit code 9"
        in results.error(hopeless)
    )


@pytest.mark.slow
def test_a_killed_study_goes_on(tmp_path):
    """Killed with no warning while runs go on: what was finished is kept, the rest is done by the next call."""
    calls = tmp_path / "calls"
    script = tmp_path / "study.py"
    script.write_text(
        "from pathlib import Path\n"
        "from tests.study.runs.test_runner import do, planted\n"
        f"do(Path({str(tmp_path / 'study')!r}), *(planted(i, Path({str(calls)!r}), waits=1) for i in range(60)))\n"
    )
    path = os.pathsep.join([".", *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    process = subprocess.Popen(
        [sys.executable, script], cwd=Path(__file__).parents[3], env=os.environ | {"PYTHONPATH": path}
    )
    while not (calls.exists() and len(calls_of(calls)) >= 5):
        assert process.poll() is None, "the study ended before five runs were done"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(calls_of(calls))
    runs = [planted(i, calls, waits=1) for i in range(60)]
    results = do(tmp_path / "study", *runs)
    assert [results.get(run).result["total"] for run in runs] == list(range(60))
    assert 60 <= len(calls_of(calls)) <= 61  # at most the one at work is done twice
    assert before < 60


def test_two_studies_do_not_share_a_folder(tmp_path):
    with RunStore(tmp_path), pytest.raises(InputError, match="another study is writing"):
        RunStore(tmp_path)
