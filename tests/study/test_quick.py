"""Experiments at their smallest, on built-in data: one in this process, all as the command line runs them."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pytest

from spectralbasis.study.conduct import study
from spectralbasis.study.experiments import EXPERIMENTS

DONE_BEFORE = 12
"""Runs after which the study is killed."""


def begin(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "spectralbasis", "study", "quick", "-o", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_concluded(folder: Path, names: Iterable[str]) -> None:
    """Every run was done once and without an error, and every claim of these experiments has a verdict."""
    rows = pd.read_parquet(folder / "runs.parquet")
    assert rows["key"].is_unique
    assert rows["error"].isna().all()
    experiments = json.loads((folder / "results.json").read_text())["experiments"]
    assert list(experiments) == list(names)
    for name, part in experiments.items():
        assert (part["finished"], part["failed"]) == (part["planned"], {}), name
        assert part["tables"], name
        assert f"# {EXPERIMENTS[name].title or name}\n" in (folder / f"{name}.md").read_text()
        for claim in part["claims"]:
            assert claim["verdict"] in ("supported", "contradicted", "undecided")
            low, effect, high = (math.nan if claim[key] is None else claim[key] for key in ("low", "effect", "high"))
            assert math.isnan(low) or low <= effect <= high, claim
    assert "<h2" in (folder / "index.html").read_text()


def test_one_experiment_ends_with_a_verdict_on_every_claim(tmp_path):
    study("stability", preset="quick", output=tmp_path, progress=False)
    assert_concluded(tmp_path, ["stability"])


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_and_ends_with_a_verdict_on_every_claim(tmp_path):
    with begin(tmp_path) as killed:
        assert killed.stderr is not None
        assert any(line.startswith(f"{DONE_BEFORE}/") for line in killed.stderr)
        killed.kill()
    with begin(tmp_path) as resumed:
        _, told = resumed.communicate()
    assert resumed.returncode == 0, told
    first = next(int(found[1]) for line in told.splitlines() if (found := re.match(r"(\d+)/\d+ ", line)))
    assert first > DONE_BEFORE
    assert_concluded(tmp_path, EXPERIMENTS)
