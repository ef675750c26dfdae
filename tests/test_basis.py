"""A basis of a whole checkpoint: computed, saved, loaded lazily, and refused where it is no basis."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spectralbasis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.files import checksum
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
    text = json.dumps({**header, "version": 99})
    save_file(load_file(file), other, metadata={"spectralbasis": text, "checksum": checksum(text)})
    with pytest.raises(InputError, match="version is 99, expected 2"):
        SpectralBasis.load(other)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        SpectralBasis.load(file)


def rewritten(file, change_header=lambda header: None, change_tensors=lambda tensors: None, name="layer.0.dense"):
    """A basis file as whoever forges one would write it: with right checksums."""
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["spectralbasis"])
    tensors = load_file(file)
    change_tensors(tensors)
    part = {
        field: tensors[f"{name}.{field}"] for field in ("U", "S", "Vh", "residuals") if f"{name}.{field}" in tensors
    }
    header["checksums"][name] = checksum(tensors=part)
    change_header(header)
    text = json.dumps(header)
    save_file(tensors, file, metadata={"spectralbasis": text, "checksum": checksum(text)})
    return file


@pytest.fixture
def stored(state, tmp_path):
    return SpectralBasis.compute(state, leading=4).save(tmp_path / "basis.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda header: header.pop("kind"), "kind is missing"),
        (lambda header: header.update(skipped=["a"]), r"skipped is \['a'\], expected an object"),
        (lambda header: header.update(leading=None), "leading is None, expected a valid integer or a valid number or"),
        (lambda header: header.update(version=1), "version is 1, expected 2"),
        (lambda header: header.update(more=1), "more is not known"),
        (lambda header: header["matrices"]["layer.0.dense"].update(evil=1), "layer.0.dense.evil is not known"),
        (lambda header: header["matrices"]["layer.0.dense"].pop("solver"), "layer.0.dense.solver is missing"),
        (
            lambda header: header["matrices"]["layer.0.dense"].update(subspace_error_bound=float("nan")),
            "subspace_error_bound is nan, expected a finite number",
        ),
        (
            lambda header: header["matrices"].update(other=header["matrices"]["layer.0.dense"]),
            "its header and its tensors differ in other",
        ),
        (lambda header: header["checksums"].pop("layer.1.dense"), "differ in layer.1.dense"),
    ],
)
def test_a_header_that_is_not_ours_is_refused_in_a_sentence(stored, change, said):
    rewritten(stored, change)
    with pytest.raises(InputError, match=said):
        SpectralBasis.load(stored)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("U", torch.eye(30, 4) * torch.nan, "U has a NaN or infinite entry"),
        ("U", torch.ones(30, 4), "columns of U are not orthonormal"),
        ("Vh", 2 * torch.eye(4, 20), "rows of Vh are not orthonormal"),
        ("S", torch.tensor([1.0, 2.0, 3.0, 4.0]), "S is not descending"),
        ("residuals", -torch.ones(4), "residuals has a negative entry"),
        ("U", torch.eye(30, 5), "has tensors of shapes"),
        ("S", torch.ones(7), "has tensors of shapes"),
        ("S", torch.tensor(1.0), "has tensors of shapes"),
        ("U", torch.eye(30, 4).double(), "has tensors of type F32, F64, expected F32"),
    ],
)
def test_tensors_that_cannot_be_triplets_are_refused_in_a_sentence(stored, field, value, said):
    rewritten(stored, change_tensors=lambda tensors: tensors.update({f"layer.0.dense.{field}": value}))
    with pytest.raises(InputError, match=said):
        SpectralBasis.load(stored)["layer.0.dense"]


def test_more_directions_than_a_matrix_has_are_refused(stored):
    forged = {"U": torch.eye(3, 5), "S": torch.ones(5), "Vh": torch.eye(5, 9), "residuals": torch.zeros(5)}
    rewritten(stored, change_tensors=lambda t: t.update({f"layer.0.dense.{f}": forged[f] for f in forged}))
    with pytest.raises(InputError, match=r"1 <= k <= min\(m, n\)"):
        SpectralBasis.load(stored)


def test_a_file_without_a_checksum_is_refused(stored):
    with safe_open(stored, framework="pt") as opened:
        text = opened.metadata()["spectralbasis"]
    save_file(load_file(stored), stored, metadata={"spectralbasis": text})
    with pytest.raises(InputError, match="its header fails its checksum"):
        SpectralBasis.load(stored)
