"""Triplets of one matrix: the hash, the sign rule, the certificate of a part, and the disk cache."""

import pytest
import torch

from spectralbasis import triplets as module
from spectralbasis.linalg import principal_angles
from spectralbasis.triplets import cache_folder, compute_triplets, matrix_hash
from tests.matrices import power_law, with_spectrum


@pytest.fixture
def W():
    return with_spectrum(90, 70, power_law(70))[0].float()


def test_the_hash_is_of_values_and_shape_not_of_storage(W):
    bf16 = W.to(torch.bfloat16)
    assert matrix_hash(bf16) == matrix_hash(bf16.float())
    assert matrix_hash(W.T) == matrix_hash(W.T.contiguous())
    assert matrix_hash(W) != matrix_hash(bf16)
    assert matrix_hash(W) != matrix_hash(W.reshape(70, 90))
    changed = W.clone()
    changed[-1, -1] += 1e-3
    assert matrix_hash(changed) != matrix_hash(W)


def test_the_hash_does_not_depend_on_the_size_of_its_blocks(W, monkeypatch):
    whole = matrix_hash(W)
    monkeypatch.setattr(module, "_HASH_BLOCK", 1000)
    assert matrix_hash(W) == whole


def test_signs_follow_the_rule_whatever_the_sign_of_the_solver(W):
    found, flipped = compute_triplets(W, 5), compute_triplets(-W, 5)
    largest = found.U.gather(0, found.U.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    torch.testing.assert_close(found.U, flipped.U, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.Vh, -flipped.Vh, atol=1e-5, rtol=0)


def test_a_part_carries_the_certificate_of_its_own_gap():
    A, U, _ = with_spectrum(80, 70, torch.tensor([4.0, 2.0, 2.0, 1.0]))
    found = compute_triplets(A, 3)
    assert found.leading(2).subspace_error_bound == 1.0
    assert found.leading(1).subspace_error_bound < 1e-5
    assert found.leading(1).next_singular_value == pytest.approx(2.0)
    assert float(principal_angles(found.leading(1).U, U[:, :1]).max()) < 1e-6
    with pytest.raises(ValueError, match=r"k=4 is outside 1\.\.3"):
        found.leading(4)


def count_solves(monkeypatch) -> list[int]:
    solved = []
    solve = module.leading_svd
    monkeypatch.setattr(module, "leading_svd", lambda W, k, **rest: solved.append(k) or solve(W, k, **rest))
    return solved


def test_a_matrix_is_decomposed_once_per_machine_and_fewer_directions_come_from_more(W, monkeypatch):
    solved = count_solves(monkeypatch)
    first = compute_triplets(W, 12)
    again, fewer = compute_triplets(W.clone(), 12), compute_triplets(W, 4)
    assert solved == [12]
    torch.testing.assert_close(again.U, first.U, rtol=0, atol=0)
    torch.testing.assert_close(fewer.Vh, first.Vh[:4], rtol=0, atol=0)
    assert (again.subspace_error_bound, again.solver, again.base_hash) == (
        first.subspace_error_bound,
        first.solver,
        first.base_hash,
    )
    compute_triplets(W, 13)
    compute_triplets(W, 12, cache=False)
    assert solved == [12, 13, 12]


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0garbage!", None])
def test_a_damaged_cache_file_is_computed_again(W, monkeypatch, damage):
    first = compute_triplets(W, 6)
    (stored,) = cache_folder().rglob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:-9] if damage is None else damage)
    solved = count_solves(monkeypatch)
    torch.testing.assert_close(compute_triplets(W, 6).U, first.U)
    assert solved == [6]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(W, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written, so triplets are computed anew"):
        found = compute_triplets(W, 3)
    torch.testing.assert_close(found.U, compute_triplets(W, 3, cache=False).U)


def test_the_cache_folder_is_the_one_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRALBASIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "spectralbasis"
