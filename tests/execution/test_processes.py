"""Local processes: a death is known by its call, what goes wrong travels as text, closing is at once."""

import subprocess
import sys
import time
from multiprocessing import resource_tracker

import psutil
import pytest

from spectralbasis import execution
from spectralbasis.errors import InputError
from spectralbasis.execution import Crew, Failure, Processes, open_executor
from tests.execution import planted


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    monkeypatch.setattr(execution, "START_METHOD", "fork")  # many start, and what they do needs no threads


def results(crew):
    found = {}
    while done := crew.finished():
        found |= dict(done)
    return found


def test_a_killed_process_costs_its_own_call_alone(tmp_path):
    with Processes(2) as executor:
        crew = Crew(executor)
        crew.start("killed once", planted.die, 1, tmp_path / "marks")
        crew.start("other", planted.double, 4)
        assert results(crew) == {"killed once": "done", "other": 8}
    assert planted.count(tmp_path / "marks") == 2


def test_a_call_that_always_kills_is_a_failure_with_its_reason(tmp_path):
    with Processes(2) as executor:
        crew = Crew(executor)
        crew.start("deadly", planted.die, 99, tmp_path / "marks")
        crew.start("other", planted.double, 4)
        found = results(crew)
        assert isinstance(found["deadly"], Failure)
        assert "its process was killed by SIGKILL" in found["deadly"].reason
        assert found["other"] == 8
        crew.start("after", planted.double, 1)
        assert results(crew) == {"after": 2}
    assert planted.count(tmp_path / "marks") == 3


def test_a_process_that_dies_idle_is_replaced():
    with Processes(1) as executor:
        crew = Crew(executor)
        crew.start("first", planted.double, 1)
        results(crew)
        for child in psutil.Process().children():
            child.kill()
            child.wait()
        crew.start("second", planted.double, 2)
        assert results(crew) == {"second": 4}


def test_errors_and_results_that_cannot_travel_are_sentences():
    with Processes(1) as executor:
        crew = Crew(executor)
        for sentence, work, *arguments in (
            ("no such file", planted.fail, InputError("no such file")),
            ("unexpected ZeroDivisionError", planted.fail, ZeroDivisionError("by zero")),
            ("its result cannot be sent", planted.unsendable),
        ):
            crew.start(sentence, work, *arguments)
            [(_, failure)] = crew.finished()
            assert sentence in failure.reason


def test_leaving_ends_what_is_under_way(tmp_path):
    resource_tracker.ensure_running()  # which stays, as it serves the whole interpreter
    others = set(psutil.Process().children())
    with Processes(2) as executor:
        crew = Crew(executor)
        crew.start("long", planted.sleep, 600, tmp_path / "started")
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        children = set(psutil.Process().children()) - others
        assert len(children) == 2
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from spectralbasis.execution import Crew, Processes\n"
        "with Processes(1) as executor:\n"
        "    crew = Crew(executor)\n"
        "    crew.start(1, abs, -1)\n"
        "    crew.finished()\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "must do so under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


def test_no_workers_and_no_cluster_are_sentences():
    with pytest.raises(InputError, match="workers must be from 1 to 1024, got 0"):
        open_executor(0)
