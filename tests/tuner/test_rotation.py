"""Blocks and rotations in models: what they do to singular values, and what becomes of sums of them."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import spectralbasis as sb
from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import InputError
from tests.tuner.cases import CASES

CASE = CASES["mlp, rotation"]


def layer(model):
    return model.base_model.model.lin0


def base(m=14, n=11):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(n, m))


def config(**changes):
    return sb.SpectralConfig(
        **{"target_modules": ["0"], "coefficients": "rotation", "leading": 7, "init_weights": False} | changes
    )


@pytest.mark.parametrize("basis", ["pretrained", "minor"])
@pytest.mark.parametrize("block_size", [1, 3, 7, 64])
def test_the_singular_values_move_by_c_and_the_left_vectors_stay(basis, block_size):
    model = get_peft_model(base().double(), config(basis=basis, block_size=block_size, scaling="absolute"))
    one = model.base_model.model[0]
    c = 0.05 * torch.randn(7, dtype=torch.float64)
    one.stored("default").data[:7] = c
    W, tuned = one.weight.detach(), one.weight.detach() + one.get_delta_weight("default")
    U, V = (factor.double() for factor in one.factors("default").first(7))
    S = torch.tensor(model.peft_config["default"].singular_values["0"], dtype=torch.float64)
    torch.testing.assert_close(
        torch.linalg.svdvals(U.T @ tuned), (S + c).sort(descending=True).values, atol=1e-5, rtol=0
    )
    rows = U.T @ tuned
    torch.testing.assert_close(rows @ rows.T, torch.diag((S + c).square()), atol=1e-5, rtol=0)
    outside = torch.eye(14, dtype=torch.float64) - U @ U.T
    torch.testing.assert_close(outside @ tuned, outside @ W, atol=1e-6, rtol=0)
    turned = rows / (S + c)[:, None] @ V
    assert (turned - torch.eye(7)).abs().max() > (0.1 if block_size > 1 else -1)
    torch.testing.assert_close(turned @ turned.T, torch.eye(7, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scaling", ["absolute", "relative", "normalized"])
def test_blocks_of_one_direction_are_a_diagonal_and_one_block_is_a_core(scaling):
    x = torch.randn(5, 11)
    for kind, size, other in (("block", 1, "diagonal"), ("rotation", 1, "diagonal"), ("block", 9, "core")):
        first = get_peft_model(base(), config(coefficients=kind, block_size=size, scaling=scaling))
        second = get_peft_model(base(), config(coefficients=other, scaling=scaling))
        stored = first.base_model.model[0].stored("default")
        second.base_model.model[0].stored("default").data = stored.data.reshape(7, -1).squeeze(1)
        torch.testing.assert_close(first(x), second(x))


def test_a_weighted_sum_of_rotations_is_a_core_and_exact(tmp_path):
    model = CASE.adapted()
    model.add_adapter("other", CASE.settings())
    model.base_model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum")
    assert model.peft_config["sum"].coefficients == "core"
    first, second, total = (layer(model).get_delta_weight(name) for name in ("default", "other", "sum"))
    assert first.norm() > 0.1
    torch.testing.assert_close(total, 0.5 * first - 2 * second)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(CASE.base(), tmp_path / "sum")
    torch.testing.assert_close(CASE.output(loaded), CASE.output(model))


def test_a_weighted_sum_of_rotations_of_parameters_is_exact():
    case = CASES["mlp"]
    settings = {"target_modules": None, "target_parameters": ["lin1.weight"], "coefficients": "rotation", "leading": 5}
    model = case.adapted(**settings)
    model.add_adapter("other", case.settings(**settings))
    model.base_model.add_weighted_adapter(["default", "other"], [1.5, -1.0], "sum")
    one = model.base_model.model.lin1
    first, second, total = (one.get_delta_weight(name) for name in ("default", "other", "sum"))
    torch.testing.assert_close(total, 1.5 * first - second)


def test_adapters_of_different_kinds_share_a_model_and_a_batch():
    kinds = {"default": "rotation", "block": "block", "core": "core", "diagonal": "diagonal"}
    model = CASE.adapted()
    for name, kind in kinds.items():
        if name != "default":
            model.add_adapter(name, CASE.settings(coefficients=kind))
    rows = [*kinds, "__base__", *kinds]
    mixed = CASE.output(model, adapter_names=rows)
    for name in kinds:
        model.set_adapter(name)
        own = CASE.output(model)
        for row in (i for i, one in enumerate(rows) if one == name):
            torch.testing.assert_close(mixed[row], own[row], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[4], CASE.base_output()[4])
    model.set_adapter("default")
    before = CASE.output(model)
    model.merge_adapter(["default", "block"])
    model.unmerge_adapter()
    assert torch.equal(CASE.output(model), before)


def test_directions_that_are_no_singular_vectors_are_refused(tmp_path):
    with pytest.raises(InputError, match="basis='random' has none of"):
        config(basis="random")
    batches = [{"input": torch.randn(20, 11)}]
    curved = sb.curvature_basis(base(), batches, loss=lambda model, batch: model(**batch).square().mean())
    other = SpectralBasis.compute(nn.Sequential(nn.Linear(11, 14)), leading=7)
    file = curved.save(tmp_path / "curved.safetensors")
    with pytest.raises(InputError, match="0 are no singular vectors of this weight"):
        get_peft_model(base(), config(basis=str(file)))
    file = other.save(tmp_path / "other.safetensors")
    with pytest.warns(UserWarning, match="other weights"), pytest.raises(InputError, match="are no singular vectors"):
        get_peft_model(base(), config(basis=str(file)))


def test_a_basis_file_of_the_same_weights_serves(tmp_path):
    file = SpectralBasis.compute(base(), leading=7).save(tmp_path / "basis.safetensors")
    torch.manual_seed(0)
    found = get_peft_model(base(), config(basis=str(file)))
    torch.manual_seed(0)
    expected = get_peft_model(base(), config())
    x = torch.randn(4, 11)
    torch.testing.assert_close(found(x), expected(x))


@pytest.mark.parametrize("coefficients", ["block", "rotation"])
@pytest.mark.parametrize("k", [1, 5, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_trains_and_is_read_again_bit_by_bit(coefficients, k, dtype, tmp_path):
    model = get_peft_model(base().to(dtype), config(coefficients=coefficients, leading=k, block_size=4))
    x = torch.randn(11, 6).to(dtype).T  # not contiguous
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model(x).detach()
    model(x).float().square().mean().backward()
    optimizer.step()
    after = model(x).detach()
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base().to(dtype), tmp_path)
    assert torch.equal(loaded(x), after)


def test_a_fresh_process_reads_it(tmp_path):
    model = get_peft_model(base(), config())
    model.save_pretrained(tmp_path)
    torch.save(base().state_dict(), tmp_path / "base.pt")
    x = torch.randn(2, 11)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, spectralbasis; from peft import PeftModel; d = sys.argv[1]\n"
        "base = torch.nn.Sequential(torch.nn.Linear(11, 14)); base.load_state_dict(torch.load(d + '/base.pt'))\n"
        "torch.save(PeftModel.from_pretrained(base, d)(torch.load(d + '/x.pt')), d + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), model(x))


@pytest.mark.parametrize("coefficients", ["block", "rotation"])
def test_second_derivatives_through_a_model_are_those_of_the_dense_weight(coefficients):
    model = get_peft_model(base().double(), config(coefficients=coefficients, block_size=3))
    one, x = model.base_model.model[0], torch.randn(6, 11, dtype=torch.float64)
    stored = one.stored("default")
    U, V = (factor.double() for factor in one.factors("default").first(7))

    def dense():
        return x @ (one.weight + U @ one.parametrisation("default")(stored) @ V.T).T + one.bias

    hessians = []
    for output in (lambda: model(x), dense):
        (first,) = torch.autograd.grad(output().pow(3).sum(), stored, create_graph=True)
        hessians.append(torch.autograd.grad(first.square().sum(), stored)[0])
    torch.testing.assert_close(*hessians, rtol=1e-6, atol=1e-6)


def test_a_copy_of_a_layer_has_its_own_numbers():
    model = get_peft_model(base(), config())
    twin = copy.deepcopy(model)
    twin.base_model.model[0].stored("default").data.zero_()
    x = torch.randn(2, 11)
    torch.testing.assert_close(twin(x), base()(x))
    assert not torch.allclose(model(x), twin(x), atol=1e-3)
