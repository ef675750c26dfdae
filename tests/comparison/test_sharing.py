"""What finetuned checkpoints share: closed forms, symmetry, the independent null, and the store."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

import spectralbasis as sb
from spectralbasis.comparison import measuring
from spectralbasis.comparison.nulls import draw_generator, scrambled
from spectralbasis.comparison.sharing import UPDATE_DIRECTIONS, update_directions
from spectralbasis.comparison.statistics import against_haar, against_null, against_unrelated
from spectralbasis.linalg import leading_svd, singular_values, subspace_overlap
from spectralbasis.triplets import matrix_hash
from tests.comparison.pairs import layered
from tests.matrices import orthonormal, power_law, with_spectrum

COLUMNS = "tuned_a, tuned_b, matrix, layer, kind, m, n, k, metric, side, value, null, null_mean, null_std, z, p_value"
K, M, N = 4, 30, 24


def bases(layers: int = 6):
    return {f"{layer}.dense": with_spectrum(M, N, power_law(N), seed=layer)[0].float() for layer in range(layers)}


def finetuned(base, seed, *, common=0.0, size=0.5):
    """Random updates of norm `size`, of whose square the share `common` is one update that all have."""
    own = torch.Generator().manual_seed(1000 + seed)
    tuned = {}
    for place, (name, W0) in enumerate(base.items()):
        parts = [torch.randn(M, N, generator=g) for g in (torch.Generator().manual_seed(place), own)]
        shared, alone = (part / part.norm() for part in parts)
        tuned[name] = W0 + size * (common**0.5 * shared + (1 - common) ** 0.5 * alone)
    return tuned


def compare(base, tuned, **options):
    return sb.compare(layered(base), [layered(one) for one in tuned], **{"leading": K, "draws": 4, **options})


def rows(result, metric, k=K, side="left"):
    table = result.sharing
    return table[(table.metric == metric) & (table.k == k) & (table.side == side)]


def test_identical_checkpoints_share_everything_but_their_null_is_still_of_independent_updates():
    base = bases(3)
    one = finetuned(base, 0)
    result = compare(base, [one, {name: W.clone() for name, W in one.items()}])
    table = result.sharing
    assert table["value"].to_numpy() == pytest.approx(1, abs=1e-6)
    assert (rows(result, "subspace_overlap")["null_mean"] < 0.95).all()
    assert result.summary()["sharing"]["effect"] > 0.05


def drawn(W0, W1, seed, draw):
    """Leading left vectors of the base under one scrambled update."""
    generator = draw_generator(seed, matrix_hash(W0), matrix_hash(W1), draw)
    return leading_svd(W0 + scrambled(W1 - W0, generator), K).U


def test_values_and_nulls_are_those_of_their_definitions():
    base = bases(1)
    W0 = base["0.dense"]
    one, two = finetuned(base, 0), finetuned(base, 1)
    result = compare(base, [one, two], seed=7)
    (row,) = rows(result, "subspace_overlap").to_dict("records")
    A, B = one["0.dense"], two["0.dense"]
    U0, Ua, Ub = (torch.linalg.svd(W.double()).U[:, :K] for W in (W0, A, B))
    assert row["value"] == pytest.approx(subspace_overlap(Ua, Ub), abs=1e-6)
    assert row["base_overlap_a"] == pytest.approx(subspace_overlap(U0, Ua), abs=1e-6)
    assert row["base_overlap_b"] == pytest.approx(subspace_overlap(U0, Ub), abs=1e-6)
    draws = [[drawn(W0, W, 7, draw) for W in (A, B)] for draw in range(4)]
    fit = against_null(row["value"], np.array([subspace_overlap(*pair) for pair in draws]))
    assert (row["null"], row["null_mean"]) == ("scrambled", pytest.approx(fit.null_mean, abs=1e-6))
    assert row["p_value"] == pytest.approx(fit.p_value, abs=1e-4)
    (whole,) = rows(result, "update_cosine", side="both").to_dict("records")
    dA, dB = A - W0, B - W0
    assert whole["value"] == pytest.approx(float((dA * dB).sum() / dA.norm() / dB.norm()), abs=1e-6)
    (own,) = rows(result, "update_overlap", k=8, side="right").to_dict("records")
    Va, Vb = (torch.linalg.svd(D.double()).Vh[:8].T for D in (dA, dB))
    assert own["value"] == pytest.approx(subspace_overlap(Va, Vb), abs=1e-6)
    assert own["null_mean"] == pytest.approx(8 / N)


def test_a_planted_common_update_is_found():
    base = bases()
    found = compare(base, [finetuned(base, seed, common=0.6) for seed in range(2)])
    sharing = found.summary()["sharing"]
    assert sharing["verdict"] == "supported"
    (pair,) = sharing["pairs"]
    assert pair["update_cosine"] == pytest.approx(0.6, abs=0.05)
    assert pair["update_overlap"] > pair["update_overlap_haar"] + 0.1
    assert (rows(found, "update_cosine", side="both")["p_value"] < 0.01).all()


def test_independent_updates_share_nothing_beyond_chance():
    held = 0
    for trial in range(6):
        base = bases()
        tuned = [finetuned(base, 10 * trial + seed) for seed in range(2)]
        sharing = compare(base, tuned, seed=trial).summary()["sharing"]
        assert sharing["value"] > 0.5
        held += sharing["ci_low"] < 0 < sharing["ci_high"]
    assert held >= 5


def test_swapping_two_checkpoints_changes_nothing():
    base = bases(2)
    a, b = finetuned(base, 0), finetuned(base, 1)
    forth, back = (compare(base, tuned).sharing for tuned in ([a, b], [b, a]))
    swapped = {"base_overlap_a": "base_overlap_b", "base_overlap_b": "base_overlap_a"}
    back = back.rename(columns=swapped)[forth.columns].assign(tuned_a=forth.tuned_a, tuned_b=forth.tuned_b)
    pd.testing.assert_frame_equal(forth, back, rtol=1e-9)


def test_the_columns_metrics_and_ranges():
    base = bases(2)
    result = compare(base, [finetuned(base, seed) for seed in range(3)])
    table = result.sharing
    assert list(table.columns)[:16] == COLUMNS.split(", ")
    assert set(table.metric) == {"subspace_overlap", "update_cosine", "update_overlap"}
    assert set(table[table.metric == "update_overlap"].k) == {1, 2, 4, 8}
    assert table["value"].between(-1, 1).all()
    assert table["p_value"].between(0, 1).all()
    assert len(table.groupby(["tuned_a", "tuned_b"])) == 3
    assert len(result.summary()["sharing"]["pairs"]) == 3
    assert "(3 pairs; the mean is over all)" in result.summary()["methods"]


def test_one_checkpoint_shares_with_nobody(tmp_path):
    base = bases(2)
    compare(base, [finetuned(base, seed) for seed in range(2)], output=tmp_path)
    assert (tmp_path / "sharing.parquet").exists()
    alone = compare(base, [finetuned(base, 0)], output=tmp_path)
    assert alone.sharing is None
    assert "sharing" not in alone.summary()
    assert not (tmp_path / "sharing.parquet").exists()


def test_without_a_null_the_overlap_is_not_tested():
    base = bases(2)
    result = compare(base, [finetuned(base, seed) for seed in range(2)], null=None)
    sharing = result.summary()["sharing"]
    assert (sharing["verdict"], sharing["null_mean"]) == ("undecided", None)
    assert json.dumps(sharing, allow_nan=False)
    assert set(rows(result, "subspace_overlap")["null"]) == {""}


def test_the_rank_of_a_low_rank_update_limits_its_directions():
    W0 = with_spectrum(M, N, power_law(N))[0].float()
    low = W0 + 0.01 * (orthonormal(M, 3, 1) @ orthonormal(N, 3, 2).T).float()
    for W1, rank in ((low, 3), (W0 + torch.randn(M, N), UPDATE_DIRECTIONS)):
        update = W1 - W0
        assert update_directions(update, singular_values(update), float(W0.norm())).S.numel() == rank


def test_the_haar_law_of_an_overlap_is_uniform_in_its_p_values():
    for k in (1, 3):
        p_values = [
            against_haar(subspace_overlap(orthonormal(12, k, 2 * i), orthonormal(12, k, 2 * i + 1)), 12, k).p_value
            for i in range(400)
        ]
        assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.isnan(against_haar(1.0, 5, 5).p_value)


@pytest.mark.parametrize("rank", [1, 12])
def test_the_law_of_a_cosine_between_scrambled_updates(rank):
    A, B = (orthonormal(16, rank, seed) @ orthonormal(12, rank, seed + 1).T for seed in (0, 5))
    cosines = [float((scrambled(A, draw_generator(0, i)) * B).sum() / A.norm() / B.norm()) for i in range(1500)]
    fits = [against_unrelated(cosine, (16, 12)) for cosine in cosines]
    assert np.std(cosines) == pytest.approx(fits[0].null_std, rel=0.12)
    for level in (0.01, 0.05):
        assert np.mean([fit.p_value <= level for fit in fits]) <= level


@pytest.fixture
def files(tmp_path):
    base = bases(4)
    save_file(layered(base), tmp_path / "base.safetensors")
    for seed in range(3):
        save_file(layered(finetuned(base, seed)), tmp_path / f"t{seed}.safetensors")
    return tmp_path / "base.safetensors", [tmp_path / f"t{seed}.safetensors" for seed in range(3)]


def same(first, second):
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.sharing, second.sharing)
    assert first.summary()["sharing"] == second.summary()["sharing"]


def test_resuming_goes_on_where_it_stopped_and_adds_checkpoints(files, tmp_path, monkeypatch):
    base, tuned = files
    whole = sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "whole")
    calls = itertools.count()
    share = measuring.shared_rows

    def dies(*arguments):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return share(*arguments)

    monkeypatch.setattr(measuring, "shared_rows", dies)
    with pytest.raises(KeyboardInterrupt):
        sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "part")
    monkeypatch.setattr(measuring, "shared_rows", share)
    same(sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "part", resume=True), whole)

    def never(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring, "measure_pair", never)
    same(sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "part", resume=True), whole)
    monkeypatch.undo()
    sb.compare(base, tuned[:2], leading=K, draws=2, output=tmp_path / "grown")
    same(sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "grown", resume=True), whole)


def test_resuming_measures_the_pairs_of_a_changed_checkpoint_again(files, tmp_path):
    base, tuned = files
    sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "out")
    save_file(layered(finetuned(bases(4), 9)), tuned[1])
    again = sb.compare(base, tuned, leading=K, draws=2, output=tmp_path / "out", resume=True)
    same(again, sb.compare(base, tuned, leading=K, draws=2))


def test_one_unreadable_matrix_leaves_the_others_their_pairs(files):
    base, tuned = files
    broken = finetuned(bases(4), 1)
    broken["0.dense"][0, 0] = float("nan")
    save_file(layered(broken), tuned[1])
    sharing = sb.compare(base, tuned, leading=K, draws=2).sharing
    assert sharing[sharing.matrix == "encoder.layer.0.dense"].groupby(["tuned_a", "tuned_b"]).ngroups == 1
    assert sharing[sharing.matrix == "encoder.layer.1.dense"].groupby(["tuned_a", "tuned_b"]).ngroups == 3
