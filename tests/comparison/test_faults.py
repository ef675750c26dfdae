"""Comparisons that are killed, doubled, or spread over processes end in the same table or in a sentence."""

import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

import spectralbasis as sb
from spectralbasis.comparison.store import Store
from tests.comparison.pairs import random_updates


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base, tuned = random_updates(40, 0.3, m=160, n=140)
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors"


def measured(store: Path) -> int:
    # Opened for writing: what the killed process left in its journal must be rolled back before anyone can read.
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute("SELECT COUNT(*) FROM pairs").fetchone()[0]


@pytest.mark.slow
def test_killed_and_resumed_gives_the_table_of_one_run(files, tmp_path):
    script = "import sys, spectralbasis as sb; sb.compare(sys.argv[1], [sys.argv[2]], leading=8, output=sys.argv[3])"
    arguments = [sys.executable, "-c", script, *map(str, files), str(tmp_path / "out")]
    store = tmp_path / "out" / "store.sqlite"
    process = subprocess.Popen(arguments)
    while process.poll() is None and not (store.exists() and store.stat().st_size > 200_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < measured(store) < 40
    assert not (tmp_path / "out" / "comparison.parquet").exists()
    resumed = sb.compare(files[0], [files[1]], leading=8, output=tmp_path / "out", resume=True).table
    pd.testing.assert_frame_equal(resumed, sb.compare(files[0], [files[1]], leading=8).table)


def test_the_table_does_not_depend_on_the_number_of_processes(files, tmp_path):
    options = {"leading": 8, "draws": 2, "include": ["*.layer.[0-3].*"]}
    tuned = [files[1], tmp_path / "half.safetensors"]
    base, whole = (load_file(file) for file in files)
    save_file({name: base[name] + 0.5 * (whole[name] - base[name]) for name in base}, tuned[1])
    alone = sb.compare(files[0], tuned, **options)
    together = sb.compare(files[0], tuned, workers=2, **options)
    pd.testing.assert_frame_equal(together.table, alone.table)
    pd.testing.assert_frame_equal(together.sharing, alone.sharing)


def test_a_second_comparison_into_a_folder_is_refused_while_the_first_runs(files, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        Store(tmp_path / "out" / "store.sqlite", {}, resume=False),
        pytest.raises(sb.InputError, match="another comparison is writing"),
    ):
        sb.compare(files[0], [files[1]], leading=8, output=tmp_path / "out")
    sb.compare(files[0], [files[1]], leading=8, output=tmp_path / "out", include=["*.layer.0.*"])


def test_a_folder_that_cannot_be_made_is_a_sentence(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sb.InputError, match="choose a folder that you may write to"):
        sb.compare(files[0], [files[1]], leading=8, output=tmp_path / "file" / "out")


def test_no_workers_is_a_sentence(files):
    with pytest.raises(sb.InputError, match="workers must be from 1 to 1024, got 0"):
        sb.compare(files[0], [files[1]], workers=0)
