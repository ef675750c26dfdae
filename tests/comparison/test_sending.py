"""A matrix that travels is the same matrix; a file is taken for the sender's only if it holds the same numbers."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.comparison.distributing import by_content, by_place, perform_parcel, with_contents, with_places
from spectralbasis.comparison.measuring import MatrixTask, Settings, measure_matrix
from tests.comparison.pairs import random_updates

NAME = "encoder.layer.0.dense0"


@pytest.fixture
def files(tmp_path):
    for name, state in zip(("base", "tuned"), random_updates(2, 0.3), strict=True):
        save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def matrix(source):
    return logical_matrices(open_checkpoint(source))[0][NAME]


def task(base, tuned):
    return MatrixTask(matrix(base), {"tuned": matrix(tuned)}, Settings(leading=4, draws=2), "base", {}, {})


def travelled(what):
    return pickle.loads(pickle.dumps(what))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("send", [by_place, by_content])
def test_a_sent_matrix_is_the_matrix(tmp_path, dtype, send):
    state = {f"layers.0.{name}.weight": torch.randn(6, 5).to(dtype) for name in "abc"}
    save_file(state, tmp_path / "model.safetensors")
    for name, original in logical_matrices(open_checkpoint(tmp_path / "model.safetensors"))[0].items():
        there = travelled(send(original))
        assert there == original
        assert there.read().dtype == dtype
        assert torch.equal(there.read(), state[f"{name}.weight"])


def test_a_matrix_of_a_file_is_small_and_knows_the_way_from_anywhere(files, monkeypatch):
    monkeypatch.chdir(files[0].parent)
    there = by_place(matrix("base.safetensors"))
    assert len(pickle.dumps(there)) < 2000
    monkeypatch.chdir("/")
    assert torch.equal(there.read(), load_file(files[0])[f"{NAME}.weight"])


def test_what_is_in_memory_or_computed_has_no_place(files):
    assert by_place(matrix(load_file(files[0]))) is None


def test_a_parcel_gives_what_the_task_gives(files):
    expected = measure_matrix(task(*files))
    assert perform_parcel(travelled(with_places(task(*files)))) == expected
    assert perform_parcel(travelled(with_contents(task(*files)))) == expected
    in_memory = task(*(load_file(file) for file in files))
    assert perform_parcel(travelled(with_places(in_memory))) == expected


def test_a_file_that_is_gone_is_not_seen(files):
    parcel = with_places(task(*files))
    contents = with_contents(task(*files))
    expected = perform_parcel(parcel)
    files[1].unlink()
    assert perform_parcel(parcel) is None
    assert perform_parcel(contents) == expected


def test_another_file_of_the_same_name_and_size_is_not_taken_for_it(files):
    parcel = with_places(task(*files))
    assert perform_parcel(parcel) is not None
    _, other = random_updates(2, 0.5)
    before = files[1].stat().st_size
    save_file(other, files[1])
    assert files[1].stat().st_size == before
    assert perform_parcel(parcel) is None


def test_what_cannot_be_read_is_the_same_reason_elsewhere():
    base = {f"{NAME}.weight": torch.randn(6, 5)}
    tuned = {f"{NAME}.weight": torch.empty(6, 5, device="meta")}
    found = measure_matrix(task(base, tuned))
    assert "meta device" in found.skipped["tuned"]
    assert perform_parcel(travelled(with_places(task(base, tuned)))) == found
