"""Merging, and that it can be undone without a trace."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.triplets import matrix_hash
from spectralbasis.tuner import SpectralLayer
from tests.tuner.cases import CASES

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def spectral_layers(model):
    return [module for module in model.modules() if isinstance(module, SpectralLayer)]


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_unmerged_and_unloaded_give_the_same_output(case, safe_merge):
    model = case.adapted(modules_to_save=None)
    expected = case.output(model)
    assert not torch.allclose(expected, case.output(case.base()), **CLOSE)
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(case.output(model), expected, **CLOSE)
    model.unmerge_adapter()
    assert torch.equal(case.output(model), expected)
    unloaded = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(case.output(unloaded), expected, **CLOSE)
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not hasattr(unloaded, "peft_config")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(case, dtype):
    model = case.adapted().to(dtype)
    before = {name: matrix_hash(p) for name, p in model.named_parameters()}
    model.merge_adapter()
    assert before != {name: matrix_hash(p) for name, p in model.named_parameters()}
    model.unmerge_adapter()
    assert before == {name: matrix_hash(p) for name, p in model.named_parameters()}


def test_the_merged_weight_is_the_base_plus_u_c_v(case):
    model = case.adapted()
    expected = []
    for layer in spectral_layers(model):
        C, U, V, form = layer.terms("default")
        update = U @ (torch.diag(C) if form == "diagonal" else C) @ V.T
        stored = update.T if isinstance(layer.get_base_layer(), Conv1D) else update
        expected.append(layer.weight + stored.reshape(layer.weight.shape))
    model.merge_adapter()
    torch.testing.assert_close([layer.weight.data for layer in spectral_layers(model)], expected)


def test_a_planted_diagonal_moves_singular_values_only():
    model = CASES["mlp"].adapted(scaling="absolute")
    layer = spectral_layers(model)[0]
    before = torch.linalg.svdvals(layer.weight.double())
    layer.stored("default").data = torch.linspace(2.0, 1.0, 10)
    model.merge_adapter()
    after = torch.linalg.svdvals(layer.weight.double())
    torch.testing.assert_close(after, before + torch.linspace(2.0, 1.0, 10, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_several_adapters(case):
    model = case.adapted(modules_to_save=None, task_type=None)
    model.add_adapter("other", case.settings(modules_to_save=None, task_type=None))
    first = case.output(model)
    model.set_adapter("other")
    second = case.output(model)
    assert not torch.allclose(first, second, **CLOSE)
    merged = {
        names: case.output(copy.deepcopy(model).merge_and_unload(adapter_names=list(names)))
        for names in [("default",), ("other",), ("other", "default")]
    }
    torch.testing.assert_close(merged["default",], first, **CLOSE)
    torch.testing.assert_close(merged["other",], second, **CLOSE)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(merged["other", "default"], case.output(model), **CLOSE)


def test_merging_one_after_another_and_unmerging_all():
    case = CASES["mlp, both layers"]
    model = case.adapted()
    model.add_adapter("other", case.settings())
    expected = matrix_hash(model.base_model.model.lin0.weight)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert matrix_hash(model.base_model.model.lin0.weight) == expected


def test_merging_twice_changes_nothing(case):
    model = case.adapted()
    model.merge_adapter()
    once = case.output(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(case.output(model), once)


def test_unmerging_twice_warns():
    model = CASES["mlp"].adapted()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_merge_in_float16(case):
    expected = case.output(case.adapted(modules_to_save=None))
    unloaded = case.adapted(modules_to_save=None).half().merge_and_unload()
    found = case.output(unloaded)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_base_as_it_was(case, broken):
    for layer in spectral_layers(case.adapted()):
        layer.stored("default").data.flatten()[0] = broken
        before = matrix_hash(layer.weight)
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default seems"):
            layer.merge(safe_merge=True)
        assert matrix_hash(layer.weight) == before
        assert not layer.merged


def test_safe_merge_refuses_what_overflows_in_the_dtype_of_the_base():
    layer = spectral_layers(CASES["mlp"].adapted().half())[0]
    layer.stored("default").data = torch.full((10,), 1e6)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged


def test_what_is_unloaded_can_be_saved(case, tmp_path):
    unloaded = case.adapted(modules_to_save=None, task_type=None).merge_and_unload()
    tied = {p.data_ptr(): (name, p) for name, p in unloaded.state_dict().items()}
    save_file(dict(tied.values()), tmp_path / "model.safetensors")
    if hasattr(unloaded, "config"):
        unloaded.save_pretrained(tmp_path / "model")
        again = type(unloaded).from_pretrained(tmp_path / "model")
        torch.testing.assert_close(case.output(again), case.output(unloaded))


def test_a_merged_model_can_be_pickled_and_unmerged():
    case = CASES["mlp, both layers"]
    model = case.adapted().base_model.model
    before = case.output(model)
    for layer in spectral_layers(model):
        layer.merge()
    again = pickle.loads(pickle.dumps(model))
    for layer in spectral_layers(again):
        layer.unmerge()
    assert torch.equal(case.output(again), before)


@pytest.mark.parametrize("k", [4, 8])
@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_loaded_while_another_is_merged_refers_to_the_original_weights(k, coefficients, dtype, tmp_path):
    case = CASES["mlp"]
    trained = get_peft_model(case.base().to(dtype), case.settings(leading=k, coefficients=coefficients)).eval()
    expected = case.output(trained)
    trained.save_pretrained(tmp_path)
    model = get_peft_model(case.base().to(dtype), case.settings(leading=4)).eval()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.load_adapter(tmp_path, adapter_name="late")
    model.set_adapter("late")
    assert torch.equal(case.output(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_merged_for_good_is_another_base(dtype, tmp_path):
    case = CASES["mlp"]
    model = get_peft_model(case.base().to(dtype), case.settings(leading=4)).eval()
    model.save_pretrained(tmp_path)
    expected = case.output(model)
    with pytest.raises(BaseMismatchError, match="lin0 has hash"):
        PeftModel.from_pretrained(copy.deepcopy(model).merge_and_unload(), tmp_path)
    assert torch.equal(case.output(PeftModel.from_pretrained(model.unload(), tmp_path)), expected)


def test_a_new_adapter_on_what_is_merged_for_good_has_the_basis_of_that():
    unloaded = CASES["mlp"].adapted().merge_and_unload()
    U, _, Vh = torch.linalg.svd(unloaded.lin0.weight.detach(), full_matrices=False)
    layer = get_peft_model(unloaded, CASES["mlp"].settings(leading=3)).base_model.model.lin0
    C, found, V, _ = layer.terms("default")
    expected = U[:, :3] @ torch.diag(torch.linalg.svd(found.T @ U[:, :3]).S * C) @ Vh[:3]
    torch.testing.assert_close(found @ torch.diag(C) @ V.T, expected, atol=1e-4, rtol=1e-3)


def test_factors_for_a_merged_layer_come_from_its_original_weight():
    layer = spectral_layers(CASES["mlp"].adapted())[0]
    before = matrix_hash(layer.original_weight)
    layer.merge()
    assert matrix_hash(layer.weight) != before
    assert matrix_hash(layer.original_weight) == before


def test_disabling_while_merged_gives_the_base(case):
    model = case.adapted(modules_to_save=None, task_type=None)
    model.merge_adapter()
    expected = case.base_output()
    with model.disable_adapter():
        assert torch.equal(case.output(model), expected)


def test_the_adapter_saved_while_merged_is_the_adapter(tmp_path):
    case = CASES["mlp"]
    model = case.adapted()
    expected = case.output(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(case.output(PeftModel.from_pretrained(case.base(), tmp_path)), expected)


@pytest.mark.parametrize("wrap", [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_is_computed_at_each_use_is_adapted_but_never_merged_into(wrap):
    case = CASES["mlp"]
    base = case.base()
    wrap(base.lin0)
    torch.manual_seed(1)
    model = get_peft_model(base, case.settings()).eval()
    expected = case.output(model)
    torch.testing.assert_close(expected, case.output(case.adapted()), **CLOSE)
    with pytest.raises(InputError, match=r"computed again .* lost; before the adapter is added"):
        model.merge_adapter()
    assert torch.equal(case.output(model), expected)
