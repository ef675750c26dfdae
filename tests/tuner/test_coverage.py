"""Gradient coverage against the dense gradient of autograd."""

import warnings

import pytest
import torch
from torch import nn

from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from spectralbasis.triplets import compute_triplets
from spectralbasis.tuner.calibration import gradient_coverage, pair_directions
from tests.models import tiny
from tests.tuner.cases import CASES
from tests.tuner.test_sparse import batches, dense_gradients

BERT, GPT2 = CASES["bert"], CASES["gpt2"]
NAME = "encoder.layer.1.attention.self.value"


def shares(G, U, V):
    core = U.T @ G @ V
    energies = {"diagonal": core.diagonal(), "core": core, "left": U.T @ G, "right": G @ V}
    return {f"coverage_{name}": float(part.square().sum() / G.square().sum()) for name, part in energies.items()}


def test_equals_the_dense_computation_for_every_k():
    base = BERT.base()
    table = gradient_coverage(base, batches(), k=5, target_modules=["value", "dense"])
    assert set(table.k) == {1, 2, 4, 5}
    keys = [key for key in dict(base.named_modules()) if key.endswith(("value", "dense"))]
    assert len(keys) == table.matrix.nunique()
    for key, G in dense_gradients(base, keys).items():
        U, _, Vh = torch.linalg.svd(base.get_submodule(key).weight.detach())
        rows = table[table.matrix == key.removeprefix("bert.")]
        torch.testing.assert_close(rows.gradient_norm.iloc[0], float(G.norm()), rtol=1e-4, atol=0)
        for k, found in rows.groupby("k"):
            wanted = shares(G, U[:, :k], Vh[:k].T)
            assert found.set_index("metric").value.to_dict() == pytest.approx(wanted, rel=1e-3, abs=1e-6)


def test_a_basis_made_of_the_gradient_covers_it():
    base = BERT.base()
    G = dense_gradients(BERT.base(), [f"bert.{NAME}"])[f"bert.{NAME}"]
    svd = compute_triplets(G, 32)
    W = base.bert.get_submodule(NAME).weight.detach()
    basis = SpectralBasis({NAME: pair_directions(W, svd.U, svd.Vh.T, solver="test")})
    table = gradient_coverage(base, batches(), basis, target_modules=f".*{NAME}").set_index(["metric", "k"]).value
    expected = (svd.S.square().cumsum(0) / svd.S.square().sum()).tolist()
    for k in (1, 4, 32):
        for metric in ("coverage_diagonal", "coverage_core", "coverage_left", "coverage_right"):
            assert table[metric, k] == pytest.approx(expected[k - 1], abs=1e-4)


def test_a_random_basis_covers_what_the_null_says():
    tables = [gradient_coverage(BERT.base(), batches(), "random", k=8, basis_seed=s) for s in range(8)]
    for metric in ("coverage_left", "coverage_right", "coverage_core"):
        rows = [table[(table.metric == metric) & (table.k == 8) & (table.m > 8)] for table in tables]
        ratios = [float((one.value / one.null_mean).mean()) for one in rows]
        assert sum(ratios) / 8 == pytest.approx(1, abs=0.2)


def test_transposed_layers():
    ids = GPT2.inputs["input_ids"]
    base = GPT2.base()
    table = gradient_coverage(base, [{"input_ids": ids, "labels": ids}], k=3, target_modules=["c_fc"])
    base.requires_grad_(True)(input_ids=ids, labels=ids).loss.backward()
    W = base.transformer.h[0].mlp.c_fc.weight
    U, _, Vh = torch.linalg.svd(W.detach().T)
    rows = table[(table.matrix == "h.0.mlp.c_fc") & (table.k == 3)].set_index("metric").value.to_dict()
    assert rows == pytest.approx(shares(W.grad.T, U[:, :3], Vh[:3].T), rel=1e-3)


def test_unequal_batches_count_by_their_rows():
    whole = {"input_ids": torch.arange(1, 36).reshape(5, 7), "labels": torch.tensor([0, 1, 0, 0, 1])}
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    once, twice = (gradient_coverage(BERT.base(), given, k=3, target_modules=["query"]) for given in ([whole], parts))
    assert once.gradient_norm.tolist() == pytest.approx(twice.gradient_norm.tolist(), rel=1e-4)
    assert once.value.tolist() == pytest.approx(twice.value.tolist(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_basis_of_another_checkpoint_is_found_under_the_names_of_its_files(tmp_path, as_file):
    """transformers 5 names the layers of a ViT otherwise than its files do."""
    other, model = tiny("vit"), tiny("vit")
    other.save_pretrained(tmp_path / "other")
    basis = SpectralBasis.compute(tmp_path / "other", leading=4)
    basis.save(tmp_path / "basis.safetensors")
    batch = {"pixel_values": torch.randn(3, 3, 16, 16)}

    def loss(model, batch):
        return model(**batch).last_hidden_state[..., 0].mean()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was computed from other weights than those of this model")
        given = str(tmp_path / "basis.safetensors") if as_file else basis
        table = gradient_coverage(model, [batch], given, k=4, target_modules="all-linear", loss=loss)
    loss(model.requires_grad_(True), batch).backward()
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    measured = table[(table.k == 4) & (table.metric == "coverage_core")].set_index("matrix").value
    assert len(measured) == 12
    for key, layer in layers.items():
        if key in measured:
            U, _, Vh = torch.linalg.svd(other.get_submodule(key).weight.detach())
            wanted = shares(layer.weight.grad, U[:, :4], Vh[:4].T)["coverage_core"]
            assert measured[key] == pytest.approx(wanted, rel=1e-3)


def test_a_basis_that_lacks_a_target():
    basis = SpectralBasis.compute(BERT.base(), leading=4, include=["*query"])
    with pytest.raises(InputError, match=r"has no directions for .*key"):
        gradient_coverage(BERT.base(), batches(), basis, target_modules=["query", "key"])
