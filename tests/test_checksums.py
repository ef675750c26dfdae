"""A checksum tells what it is of; a basis and cached triplets with a turned bit are refused or computed again."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectralbasis import SpectralBasis
from spectralbasis import triplets as module
from spectralbasis.errors import InputError
from spectralbasis.files import cache_folder, checksum
from spectralbasis.triplets import compute_triplets
from tests.damage import data_start, flipped
from tests.matrices import power_law, with_spectrum

W = with_spectrum(30, 20, power_law(20))[0].float()


@pytest.mark.parametrize(
    "other",
    [
        checksum("ab", "d", tensors={"a": torch.arange(6.0)}),
        checksum("a", "bc", tensors={"a": torch.arange(6.0)}),
        checksum("ab", "c", tensors={"b": torch.arange(6.0)}),
        checksum("ab", "c", tensors={"a": torch.arange(6.0).reshape(2, 3)}),
        checksum("ab", "c", tensors={"a": torch.arange(6.0).view(torch.int32)}),
        checksum("ab", "c", tensors={"a": torch.tensor([0.0, 1, 2, 3, 4, 5.0000005])}),
    ],
)
def test_other_texts_names_shapes_types_and_values_have_another_checksum(other):
    assert checksum("ab", "c", tensors={"a": torch.arange(6.0)}) != other


def test_a_checksum_does_not_depend_on_order_or_storage():
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)
    assert checksum(tensors={"a": a, "b": b}) == checksum(tensors={"b": b, "a": a.T.contiguous().T})


def read_all(file):
    return {
        name: (triplets.U, triplets.S, triplets.subspace_error_bound)
        for name, triplets in SpectralBasis.load(file).items()
    }


def test_a_basis_file_with_a_turned_bit_is_refused(tmp_path):
    file = SpectralBasis.compute({"layer.dense.weight": W}, leading=4).save(tmp_path / "basis.safetensors")
    content = file.read_bytes()
    header = flipped(content[: data_start(file)], 60)
    for damaged in [
        *(start + content[data_start(file) :] for start in header),
        *flipped(content, 30, 1, data_start(file)),
    ]:
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"again|write one"):
            read_all(file)


def rewritten(file, name, **changes):
    """The file with other facts, as an earlier or a later version writes them."""
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()[name])
    facts = {key: value for key, value in {**facts, **changes}.items() if value is not None}
    text, tensors = json.dumps(facts), load_file(file)
    sealed = checksum(text) if name == "spectralbasis" else checksum(text, tensors=tensors)
    save_file(tensors, file, metadata={name: text, "checksum": sealed})


@pytest.mark.parametrize("version", [1, 3])
def test_a_basis_file_of_another_version_is_refused(tmp_path, version):
    file = SpectralBasis.compute({"layer.dense.weight": W}, leading=4).save(tmp_path / "basis.safetensors")
    rewritten(file, "spectralbasis", version=version)
    with pytest.raises(InputError, match=f"version is {version}, expected 2"):
        SpectralBasis.load(file)


def count_solves(monkeypatch) -> list[int]:
    solved, solve = [], module.leading_svd
    monkeypatch.setattr(module, "leading_svd", lambda W, k, **rest: solved.append(k) or solve(W, k, **rest))
    return solved


def test_cached_triplets_with_a_turned_bit_are_computed_again(monkeypatch):
    first = compute_triplets(W, 4)
    (stored,) = cache_folder().rglob("*.safetensors")
    content, solved = stored.read_bytes(), count_solves(monkeypatch)
    for count, damaged in enumerate([*flipped(content, 20), *flipped(content, 20, 1, data_start(stored))], start=1):
        stored.write_bytes(damaged)
        torch.testing.assert_close(compute_triplets(W, 4).U, first.U)
        assert len(solved) == count


@pytest.mark.parametrize("version", ["1", "3"])
def test_cached_triplets_of_another_version_are_computed_again(monkeypatch, version):
    compute_triplets(W, 4)
    (stored,) = cache_folder().rglob("*.safetensors")
    solved = count_solves(monkeypatch)
    rewritten(stored, "triplets", version=version)
    compute_triplets(W, 4)
    assert solved == [4]
