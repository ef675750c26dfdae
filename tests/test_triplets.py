"""Triplets of one matrix: the hash, the sign rule, the certificate of a part, and the disk cache."""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis import triplets as module
from spectralbasis.files import cache_folder, checksum
from spectralbasis.linalg import largest_value_outside, principal_angles
from spectralbasis.linalg.row_blocks import RowSource
from spectralbasis.triplets import (
    compute_triplets,
    compute_triplets_and_values,
    disproof,
    malformed,
    matrix_hash,
    triplet_facts,
    triplet_tensors,
)
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
    with pytest.warns(UserWarning, match="cannot be written, so triplets are computed again"):
        found = compute_triplets(W, 3)
    torch.testing.assert_close(found.U, compute_triplets(W, 3, cache=False).U)


def test_the_cache_folder_is_the_one_asked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECTRALBASIS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "spectralbasis"


def put(triplets, k=None, text=None):
    """Put triplets into the cache as somebody does who computes the right checksum; return the file."""
    folder = module._cache_files(triplets.base_hash)
    folder.mkdir(parents=True, exist_ok=True)
    text = text or json.dumps({"version": "2", **triplet_facts(triplets)})
    tensors = triplet_tensors(triplets)
    file = folder / f"k{k or triplets.k}.safetensors"
    save_file(tensors, file, metadata={"triplets": text, "checksum": checksum(text, tensors=tensors)})
    return file


def part(triplets, chosen):
    return replace(
        triplets,
        U=triplets.U[:, chosen].contiguous(),
        S=triplets.S[chosen].contiguous(),
        Vh=triplets.Vh[chosen].contiguous(),
        residuals=triplets.residuals[chosen].contiguous(),
    )


def rotated(triplets):
    """The same subspaces in other directions."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    U, Vh = triplets.U.clone(), triplets.Vh.clone()
    U[:, :2], Vh[:2] = U[:, :2] @ turn, turn.T @ Vh[:2]
    return replace(triplets, U=U, Vh=Vh)


other = with_spectrum(90, 70, power_law(70), seed=9)[0].float()
LIES = {
    "of another matrix": lambda good, _: replace(compute_triplets(other, 6, cache=False), base_hash=good.base_hash),
    "of another matrix, with the residuals to show for it": lambda good, _: replace(
        compute_triplets(other, 6, cache=False), base_hash=good.base_hash, residuals=torch.full((6,), 9.0)
    ),
    "another left vector": lambda good, _: replace(good, U=good.U.roll(1, 0)),
    "turned within the subspace": lambda good, _: rotated(good),
    "later ones as the leading ones": lambda good, more: part(more, slice(3, 9)),
    "one left out": lambda good, more: part(more, [0, 1, 2, 3, 5, 6]),
    "a next value that is too small": lambda good, _: replace(good, next_singular_value=0.0),
    "a next value above the last": lambda good, _: replace(good, next_singular_value=9.0),
    "a bound below 0": lambda good, _: replace(good, subspace_error_bound=-1.0),
    "a bound that is NaN": lambda good, _: replace(good, subspace_error_bound=math.nan),
    "values in another order": lambda good, more: part(good, [1, 0, 2, 3, 4, 5]),
    "larger values": lambda good, _: replace(good, S=good.S * 1.01),
    "the other signs": lambda good, _: replace(good, U=-good.U, Vh=-good.Vh),
    "NaN": lambda good, _: replace(good, Vh=good.Vh * math.nan),
    "directions that are not orthonormal": lambda good, _: replace(good, U=good.U * 1.01),
    "fewer rows": lambda good, _: replace(good, U=good.U[:50].contiguous()),
    "no list of values": lambda good, _: replace(good, S=torch.tensor(1.0)),
    "float64": lambda good, _: replace(good, U=good.U.double()),
}


@pytest.mark.parametrize("lie", LIES)
def test_cached_triplets_that_are_not_those_of_the_matrix_are_computed_again(W, lie, monkeypatch):
    good, more = (compute_triplets(W, k, cache=False) for k in (6, 9))
    put(LIES[lie](good, more), 6)
    solved = count_solves(monkeypatch)
    torch.testing.assert_close(compute_triplets(W, 6).U, good.U)
    assert solved == [6]
    put(LIES[lie](good, more), 6)
    found, _ = compute_triplets_and_values(W, 6, base_hash=good.base_hash)
    torch.testing.assert_close(found.U, good.U)


@pytest.mark.parametrize("text", ["[1]", "[" * 9000 + "]" * 9000, "{}", "no JSON", '{"version": "2", "solver": 5}'])
def test_cached_facts_that_are_none_are_computed_again(W, text, monkeypatch):
    put(compute_triplets(W, 6, cache=False), text=text)
    solved = count_solves(monkeypatch)
    compute_triplets(W, 6)
    assert solved == [6]


@pytest.mark.parametrize("planted", ["fifo", "folder", "link", "large", "k²", "k" + "9" * 200, "k7"])
def test_what_is_no_cache_file_of_ours_is_not_read(W, planted, monkeypatch):
    good = compute_triplets(W, 6, cache=False)
    file = put(good)
    if planted == "large":
        os.truncate(file, 1 << 33)
    elif planted.startswith("k"):
        file.rename(file.with_name(f"{planted}.safetensors"))
    else:
        kept = file.rename(file.with_name("elsewhere"))
        {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to(kept)}[planted](file)
    solved = count_solves(monkeypatch)
    blocked = planted in ("fifo", "folder", "link")
    with pytest.warns(UserWarning, match="cannot be written") if blocked else nullcontext():
        torch.testing.assert_close(compute_triplets(W, 6).U, good.U)
    assert solved == [6]


SPECTRA = {
    "power": power_law(120),
    "flat": torch.ones(120),
    "two levels": torch.cat([torch.full((10,), 3.0), torch.ones(110)]),
    "low rank": torch.cat([torch.arange(5.0, 0, -1), torch.zeros(115)]),
    "steep": torch.exp(-torch.arange(120.0) / 3),
}


@pytest.mark.parametrize("k", [1, 7, 20, 120])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_triplets_as_we_compute_them_are_not_disproved(spectrum, k):
    A = with_spectrum(150, 120, SPECTRA[spectrum])[0].float()
    for matrix in (A, A.bfloat16(), A.T):
        found = compute_triplets(matrix, k, cache=False)
        assert disproof(matrix, found) is None
        assert disproof(matrix, found.leading(max(1, k // 2))) is None


def test_triplets_of_a_matrix_that_is_read_in_rows_are_checked_too(W):
    source = RowSource((90, 70), lambda rows: W[rows].clone(), W.device)
    found = compute_triplets(W, 6, cache=False)
    assert disproof(source, found) is None
    assert disproof(source, replace(found, S=found.S * 1.01)) == "their residuals are larger than they claim"


@pytest.mark.parametrize("k", [0, 3, 10])
def test_the_largest_value_outside_is_that_of_the_next_direction(k):
    A, _, V = with_spectrum(60, 50, power_law(50))
    assert largest_value_outside(A, V[:, :k].T.contiguous()) == pytest.approx(float(power_law(50)[k]), rel=1e-2)


def test_nothing_lies_outside_of_everything():
    A = torch.eye(4, dtype=torch.float64)
    assert largest_value_outside(A, A) == 0.0
    assert largest_value_outside(A, A[:3]) == pytest.approx(1.0)


def test_what_is_wrong_with_triplets_is_said(W):
    good = compute_triplets(W, 6, cache=False)
    assert malformed(good) is None
    assert malformed(replace(good, U=good.U * 1.01)) == "the columns of U are not orthonormal"
    assert disproof(W.T, good) == "they are of a matrix (90, 70), expected (70, 90)"
