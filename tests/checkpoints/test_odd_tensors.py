"""Tensors that are not plain arrays of numbers: each is read as torch computes it, or listed with a reason."""

import warnings

import pytest
import torch
from torch import nn

from spectralbasis import SpectralBasis
from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import InputError

EIGHT = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def opened(tensor, tmp_path):
    """The tensor in a file of torch, and beside it an ordinary one."""
    torch.save({"a.weight": tensor, "b.weight": torch.eye(4)}, tmp_path / "model.pt")
    return open_checkpoint(tmp_path / "model.pt")


def with_attributes(**attributes):
    parameter = nn.Parameter(torch.randn(8, 6))
    parameter.__dict__.update(attributes)
    return parameter


READ = {
    "expanded": lambda: torch.randn(1, 6).expand(8, 6),
    "overlapping": lambda: torch.randn(20).as_strided((8, 6), (2, 1)),
    "turned": lambda: torch.randn(6, 8).T,
    "a part": lambda: torch.randn(20, 20)[3:11, 5:17:2],
    "negative": lambda: torch._neg_view(torch.randn(8, 6)),
    "imaginary part": lambda: torch.randn(8, 6, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.randn(8, 6).relu().to_sparse(),
    "sparse rows": lambda: torch.randn(8, 6).relu().to_sparse_csr(),
    "half": lambda: torch.randn(8, 6).half(),
    "attributes in place of methods": lambda: with_attributes(detach=1, is_contiguous=2, numel=3, cpu=4, stride=5),
}


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_read_as_torch_computes_them(kind, saved, tmp_path):
    torch.manual_seed(0)
    tensor = READ[kind]()
    checkpoint = opened(tensor, tmp_path) if saved else open_checkpoint({"a.weight": tensor})
    matrices, _ = logical_matrices(checkpoint)
    expected = torch.Tensor.detach(tensor)
    expected = expected.to_dense() if expected.layout != torch.strided else expected.clone()
    assert torch.equal(matrices["a"].read(), expected)
    matrices["a"].read().double().numpy()
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(matrices["a"].open_rows()(rows), expected[rows])


LISTED = {
    "complex": (lambda: torch.randn(4, 4, dtype=torch.complex64), "complex"),
    "conjugate": (lambda: torch.randn(4, 4, dtype=torch.complex64).conj(), "complex"),
    "nested": (lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)]), "nested"),
    "expanded to petabytes": (lambda: torch.randn(1).expand(10**8, 10**8), "expands a few"),
    "sparse of petabytes": (lambda: torch.sparse_coo_tensor([[1], [2]], [3.0], (10**8, 10**8)), "expands a few"),
}


@pytest.mark.parametrize("kind", LISTED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_matrix_of_real_numbers_is_listed(kind, tmp_path):
    make, reason = LISTED[kind]
    for checkpoint in (opened(make(), tmp_path), open_checkpoint({"a.weight": make(), "b.weight": torch.eye(4)})):
        matrices, skipped = logical_matrices(checkpoint)
        assert set(matrices) == {"b"}
        assert reason in skipped["a"]


def test_meta_tensors_are_refused_when_read(tmp_path):
    matrices, _ = logical_matrices(opened(torch.empty(4, 4, device="meta"), tmp_path))
    with pytest.raises(InputError, match="no values"):
        matrices["a"].read()


@pytest.mark.parametrize("kind", EIGHT)
@pytest.mark.parametrize("shape", [(12, 8), (90, 120)])
def test_basis_of_eight_bit_floats_is_that_of_their_values(kind, shape):
    torch.manual_seed(0)
    W = torch.randn(shape).to(kind)
    for leading in (3, "mp", 0.5):
        found, expected = (
            SpectralBasis.compute({"a.weight": one}, leading, cache=False)["a"] for one in (W, W.float())
        )
        torch.testing.assert_close(found.S, expected.S)
        assert found.base_hash == expected.base_hash


def test_storage_that_is_too_small_for_its_tensor_is_refused(tmp_path):
    """In the format before archives, storages follow the pickle with a size of their own."""
    torch.save({"a.weight": torch.ones(8, 8)}, tmp_path / "small.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "small.pt").read_bytes()
    for old, new in ((b"K\x08K\x08\x86", b"K\x08K\xff\x86"), (b"K@", b"K\xff")):
        (tmp_path / "large.pt").write_bytes(content.replace(old, new))
        assert content != content.replace(old, new)
        with pytest.raises(InputError):
            open_checkpoint(tmp_path / "large.pt")


def test_sparse_tensor_with_entries_outside_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outside = torch.sparse_coo_tensor([[9], [9]], [1.0], (4, 4), check_invariants=False)
        torch.save({"a.weight": outside}, tmp_path / "model.pt")
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "model.pt")
