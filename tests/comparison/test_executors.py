"""A comparison on local processes: one table wherever it is made, poison is a skip, Ctrl-C keeps what is done."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import spectralbasis as sb
from spectralbasis import execution
from spectralbasis.comparison import distributing
from spectralbasis.comparison.distributing import affordable_workers
from spectralbasis.comparison.measuring import MatrixTask, Settings
from spectralbasis.comparison.pairing import open_pairs
from tests.comparison.pairs import layered, random_updates
from tests.execution import planted


@pytest.fixture
def one_thread():
    """As in the workers: the number of threads may change the last bits of a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def files(tmp_path):
    for name, state in zip(("base", "tuned"), random_updates(6, 0.3), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def poisoned(base, tuned):
    """Two matrices more, which kill whoever measures them."""
    for layer in (7, 8):
        W = torch.randn(48, 40)
        base |= layered({f"{layer}.poison": W})
        tuned |= layered({f"{layer}.poison": W + 0.1})
    return base, tuned


def test_the_table_is_the_same_to_the_last_bit(files, one_thread):
    alone = sb.compare(files[0], [files[1]], leading=8, draws=2).table
    assert_same(sb.compare(files[0], [files[1]], leading=8, draws=2, workers=2).table, alone)


def test_so_is_that_of_weights_in_memory(files, one_thread, monkeypatch):
    monkeypatch.setattr(execution, "START_METHOD", "fork")
    states = [load_file(file) for file in files]
    alone = sb.compare(states[0], [states[1]], leading=8, draws=2).table
    assert_same(sb.compare(states[0], [states[1]], leading=8, draws=2, workers=2).table, alone)


def assert_same(table, expected):
    pd.testing.assert_frame_equal(table, expected, check_exact=True)


def test_a_matrix_that_kills_its_worker_ends_as_a_skip(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "START_METHOD", "fork")
    monkeypatch.setattr(distributing, "perform_parcel", planted.measure_or_die)
    base, tuned = random_updates(6, 0.3)
    expected = sb.compare(base, [tuned], leading=8, draws=2).table
    for name, state in zip(("base", "tuned"), poisoned(base, tuned), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    found = sb.compare(files[0], [files[1]], leading=8, draws=2, workers=2, output=tmp_path / "out").table
    pd.testing.assert_frame_equal(found.drop(columns="tuned"), expected.drop(columns="tuned"))
    skipped = json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"]
    assert set(skipped) == {"encoder.layer.7.poison", "encoder.layer.8.poison"}
    assert all("tried 3 times" in reason and "killed by SIGKILL" in reason for reason in skipped.values())
    assert planted.count(tmp_path / "measured") == 6


def tasks_of(base, tuned, settings):
    pairing = open_pairs(base, [tuned], (), ())
    return [
        MatrixTask(matrix, pairing.partners[name], settings, "base", {}, {}) for name, matrix in pairing.bases.items()
    ]


def test_there_are_no_more_processes_than_memory_for_the_largest_matrix(monkeypatch, caplog):
    base, tuned = random_updates(6, 0.3)
    base["encoder.layer.9.dense.weight"] = torch.zeros(1024, 512)
    tuned["encoder.layer.9.dense.weight"] = torch.ones(1024, 512)
    tasks = tasks_of(base, tuned, Settings(leading=8))
    need = max(task.worker_memory for task in tasks)
    monkeypatch.setattr(distributing, "available_memory", lambda: int(3.5 * need))
    assert affordable_workers(3, tasks) == 3
    assert affordable_workers(100, tasks[:2]) == 2
    assert caplog.text == ""
    assert affordable_workers(5, tasks) == 3
    assert "using 3 processes instead of 5" in caplog.text
    monkeypatch.setattr(distributing, "available_memory", lambda: need // 2)
    assert affordable_workers(5, tasks) == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(tmp_path, workers, monkeypatch):
    base, tuned = random_updates(24, 0.3, m=160, n=140)
    for name, state in {"base": base, "tuned": tuned}.items():
        save_file(state, tmp_path / f"{name}.safetensors")
    files = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    command = [sys.executable, "-m", "spectralbasis", "compare", *files, "-o", tmp_path / "out", "--leading", "8"]
    process = subprocess.Popen(
        [*map(str, command), "--workers", str(workers)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    store = tmp_path / "out" / "store.sqlite"
    while process.poll() is None and not (store.exists() and store.stat().st_size > 100_000):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    children = psutil.Process(process.pid).children(recursive=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "stopped; what was measured is kept: continue with --resume"
    assert "Traceback" not in errors
    _, left = psutil.wait_procs(children, timeout=10)
    assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    measured = []
    measure = distributing.perform_task
    monkeypatch.setattr(distributing, "perform_task", lambda task: measured.append(measure(task)) or measured[-1])
    sb.compare(files[0], [files[1]], leading=8, output=tmp_path / "out", resume=True)
    anew = sum(rows is not None for outcome in measured for _, rows in outcome.measured.values())
    assert 0 < anew < 24
