"""A basis of a whole checkpoint: computed, saved, loaded lazily, and refused where it is no basis."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectralbasis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.triplets import matrix_hash
from tests.matrices import power_law, with_spectrum


@pytest.fixture
def state():
    wide = with_spectrum(20, 40, power_law(20))[0].float()
    return {
        "layer.0.dense.weight": with_spectrum(30, 20, power_law(20), seed=7)[0].float(),
        "layer.0.dense.bias": torch.zeros(30),
        "layer.1.dense.weight": wide,
        "layer.2.dense.weight": torch.full((20, 20), float("nan")),
        "layer.3.dense.weight": torch.ones(3, 3),
    }


def test_triplets_rebuild_the_leading_part_of_each_matrix(state):
    basis = SpectralBasis.compute(state, leading=20)
    assert list(basis) == ["layer.0.dense", "layer.1.dense", "layer.3.dense"]
    assert [triplets.k for triplets in basis.values()] == [20, 20, 3]
    for name, triplets in basis.items():
        W = state[f"{name}.weight"]
        torch.testing.assert_close(triplets.U * triplets.S @ triplets.Vh, W, atol=1e-5, rtol=0)
        assert triplets.base_hash == matrix_hash(W)
        assert triplets.shape == tuple(W.shape)


def test_what_has_no_spectrum_is_listed_with_the_reason(state):
    skipped = SpectralBasis.compute(state, leading=20).skipped
    assert skipped.keys() == {"layer.2.dense"}
    assert "NaN or infinite" in skipped["layer.2.dense"]


def test_a_fraction_gives_each_matrix_its_own_number(state):
    basis = SpectralBasis.compute(state, leading=0.34)
    assert {name: triplets.k for name, triplets in basis.items()} == {
        "layer.0.dense": 7,
        "layer.1.dense": 7,
        "layer.3.dense": 1,
    }


def test_include_and_exclude_choose_by_name(state):
    assert list(SpectralBasis.compute(state, leading=2, include=["*.1.*"])) == ["layer.1.dense"]
    assert "layer.0.dense" not in SpectralBasis.compute(state, leading=2, exclude=["*.0.*"])


def test_a_saved_basis_is_the_same_and_is_read_matrix_by_matrix(state, tmp_path):
    basis = SpectralBasis.compute(state, leading=4)
    file = basis.save(tmp_path / "basis.safetensors")
    loaded = SpectralBasis.load(file)
    assert (list(loaded), loaded.leading, loaded.skipped, loaded.kind) == (list(basis), 4, basis.skipped, "pretrained")
    for name in basis:
        torch.testing.assert_close(loaded[name].U, basis[name].U, rtol=0, atol=0)
        assert loaded[name].base_hash == basis[name].base_hash
        assert loaded[name].subspace_error_bound == basis[name].subspace_error_bound


def test_nothing_to_decompose_is_an_error_with_the_reason(tmp_path):
    with pytest.raises(InputError, match=r"layer\.0\.dense: the matrix holds NaN"):
        SpectralBasis.compute({"layer.0.dense.weight": torch.full((4, 4), float("nan"))}, leading=2)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="spectralbasis basis MODEL -o"):
        SpectralBasis.load(tmp_path / "none.safetensors")


def test_a_file_of_another_kind_or_version_or_damaged_is_refused(state, tmp_path):
    other = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, other)
    with pytest.raises(InputError, match="no basis"):
        SpectralBasis.load(other)
    file = SpectralBasis.compute(state, leading=2).save(tmp_path / "basis.safetensors")
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["spectralbasis"])
    save_file(load_file(file), other, metadata={"spectralbasis": json.dumps({**header, "version": 99})})
    with pytest.raises(InputError, match="format 99, this version reads up to 2"):
        SpectralBasis.load(other)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        SpectralBasis.load(file)
