"""The doctor says what is there, and advises on what it sees alone."""

import copy
import json

import pytest
import torch
from typer.testing import CliRunner

from spectralbasis import doctor
from spectralbasis.cli import app

HEALTHY = {
    "machine": {"cores": 8, "threads": 8, "load": 0.5, "bf16": True, "devices": ["a GPU"]},
    "speed": {"one_thread": 50.0, "all_threads": 350.0},
    "cache": {"folder": "/cache", "free_bytes": 1e12, "writable": True},
    "optional": dict.fromkeys(doctor.OPTIONAL, "1.0"),
}


def test_a_healthy_machine_gets_no_advice():
    assert not list(doctor._advice(HEALTHY))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("machine", {"threads": 16}, "OMP_NUM_THREADS=8"),
        ("machine", {"load": 20.0}, "20.0 threads busy on 8 cores"),
        ("machine", {"devices": []}, "--bf16 helps here"),
        ("machine", {"devices": [], "bf16": False}, "no bf16 instructions"),
        ("speed", {"all_threads": 51.0}, "not much faster than one (51 and 50 GFLOP/s)"),
        ("cache", {"writable": False}, "/cache cannot be written"),
        ("cache", {"free_bytes": 1e9}, "1.0 GB left"),
        ("optional", {"ray": None}, "ray (clusters)"),
    ],
)
def test_each_trouble_gets_its_sentence(part, changes, words):
    facts = copy.deepcopy(HEALTHY)
    facts[part].update(changes)
    (sentence,) = doctor._advice(facts)
    assert words in sentence


def test_the_command_prints_facts_and_leaves_the_threads_alone(tmp_path, monkeypatch):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "file").write_bytes(b"1234")
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False).stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["cache"]["files"], facts["cache"]["bytes"]) == (1, 4)
    assert facts["speed"]["one_thread"] > 0
    assert torch.get_num_threads() == threads
    assert "GFLOP/s" in CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
