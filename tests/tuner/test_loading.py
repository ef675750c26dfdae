"""Opening adapters on the right base in several ways, and refusing the wrong one."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from spectralbasis import triplets
from spectralbasis.basis import SpectralBasis
from spectralbasis.errors import BaseMismatchError, InputError
from spectralbasis.tuner import SpectralConfig, SpectralLayer
from tests.tuner.cases import CASES, MLP


def save(case, folder, **changes):
    model = case.adapted(**changes)
    model.save_pretrained(folder)
    return model


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_several_adapters_miss_no_key(case, tmp_path):
    save(case, tmp_path)
    model = PeftModel.from_pretrained(case.base(), tmp_path)
    for name in ("other", "yet-another"):
        assert model.load_adapter(tmp_path, adapter_name=name).missing_keys == []


def test_low_memory_loading_leaves_nothing_on_the_meta_device(case, tmp_path):
    expected = case.output(save(case, tmp_path))
    model = PeftModel.from_pretrained(case.base(), tmp_path, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert torch.equal(case.output(model), expected)


def test_injection_without_a_peft_model(case):
    trained = case.adapted(modules_to_save=None, task_type=None)
    model = case.base()
    inject_adapter_in_model(case.settings(modules_to_save=None, task_type=None), model, low_cpu_mem_usage=True)
    assert "meta" in {p.device.type for p in model.parameters()}
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained), low_cpu_mem_usage=True)
    assert torch.equal(case.output(model), case.output(trained))


def test_loaded_adapters_are_frozen_unless_asked_otherwise(tmp_path):
    case = CASES["mlp"]
    save(case, tmp_path)
    frozen = PeftModel.from_pretrained(case.base(), tmp_path)
    trainable = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert [n for n, p in trainable.named_parameters() if p.requires_grad] == [
        "base_model.model.lin0.spectral_coefficients.default.weight"
    ]


def test_another_base_is_refused_by_name(case, tmp_path):
    save(case, tmp_path)
    base = case.base()
    name = next(iter(json.loads((tmp_path / "adapter_config.json").read_text())["base_hashes"]))
    key = next(key for key, _ in base.named_modules() if key.endswith(name))
    base.get_submodule(key).weight.data[0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match=rf"{name} has hash .* load it on"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(module, SpectralLayer) for module in base.modules())


def test_a_rounded_base_is_another_base_but_an_upcast_one_is_not(tmp_path):
    case = CASES["mlp"]
    save(case, tmp_path / "wide")
    with pytest.raises(BaseMismatchError, match="before the cast"):
        PeftModel.from_pretrained(case.base().bfloat16(), tmp_path / "wide")
    rounded = get_peft_model(case.base().bfloat16(), case.settings()).eval()
    rounded.save_pretrained(tmp_path / "narrow")
    upcast = PeftModel.from_pretrained(case.base().bfloat16().float(), tmp_path / "narrow")
    torch.testing.assert_close(case.output(upcast), case.output(rounded).float(), atol=0.05, rtol=0.05)


def test_an_adapter_fits_the_model_with_and_without_a_head(tmp_path):
    case = CASES["bert"]
    trained = save(case, tmp_path, target_modules=["query", "dense"], task_type=None)
    body = PeftModel.from_pretrained(case.base().bert, tmp_path)
    expected = trained.base_model.model.bert(**case.inputs)[0]
    assert torch.equal(body(**case.inputs)[0], expected)
    body.save_pretrained(tmp_path / "body")
    again = PeftModel.from_pretrained(case.base(), tmp_path / "body")
    assert torch.equal(again.base_model.model.bert(**case.inputs)[0], expected)


def test_a_model_without_some_of_the_matrices_says_so(tmp_path):
    save(CASES["deep mlp"], tmp_path)
    base = CASES["deep mlp"].base()
    del base.layers[1]
    with pytest.warns(UserWarning, match=r"has no layers.1.lin0 \(2 of 4 matrices are missing\)"):
        PeftModel.from_pretrained(base, tmp_path)


def test_loading_takes_the_basis_from_the_cache(tmp_path, monkeypatch):
    case = CASES["llama"]
    expected = case.output(save(case, tmp_path))
    monkeypatch.setattr(triplets, "leading_svd", lambda *args, **options: pytest.fail("decomposed again"))
    assert torch.equal(case.output(PeftModel.from_pretrained(case.base(), tmp_path)), expected)


@pytest.mark.parametrize("k", [8, 3])
def test_a_second_adapter_shares_the_factors_of_the_first(k, monkeypatch):
    case = CASES["llama"]
    model = case.adapted()
    monkeypatch.setenv("SPECTRALBASIS_CACHE", "")
    monkeypatch.setattr(triplets, "leading_svd", lambda *args, **options: pytest.fail("decomposed again"))
    model.add_adapter("other", case.settings(leading=k, coefficients="diagonal"))
    for layer in model.modules():
        if isinstance(layer, SpectralLayer):
            assert layer.factors("other") is layer.factors("default")


@pytest.fixture
def flipped_pair(monkeypatch):
    """A solver on another machine that finds one pair of vectors with the other sign, and no rule against it."""
    solve, sign = triplets.leading_svd, torch.ones(10).index_fill(0, torch.tensor([3]), -1.0)

    def solve_flipped(W, k, **options):
        svd = solve(W, k, **options)
        return dataclasses.replace(svd, U=svd.U * sign, Vh=svd.Vh * sign[:, None])

    def flip():
        monkeypatch.setenv("SPECTRALBASIS_CACHE", "")
        monkeypatch.setattr(triplets, "_from_cache", lambda *args: None)
        monkeypatch.setattr(triplets, "leading_svd", solve_flipped)

    return flip


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_the_sign_rule_undoes_the_signs_of_a_solver(coefficients, flipped_pair, tmp_path):
    case = CASES["mlp"]
    expected = case.output(save(case, tmp_path, coefficients=coefficients))
    flipped_pair()
    torch.testing.assert_close(case.output(PeftModel.from_pretrained(case.base(), tmp_path)), expected)


def test_a_diagonal_does_not_depend_on_signs(flipped_pair, tmp_path, monkeypatch):
    case = CASES["mlp"]
    expected = case.output(save(case, tmp_path))
    flipped_pair()
    monkeypatch.setattr(triplets, "fix_signs", lambda U, Vh: (U, Vh))
    torch.testing.assert_close(case.output(PeftModel.from_pretrained(case.base(), tmp_path)), expected)


def test_a_core_refuses_directions_of_another_sign(flipped_pair, tmp_path, monkeypatch):
    save(CASES["mlp"], tmp_path, coefficients="core")
    flipped_pair()
    monkeypatch.setattr(triplets, "fix_signs", lambda U, Vh: (U, Vh))
    with pytest.raises(BaseMismatchError, match=r"lin0 are not those .* spectralbasis basis MODEL"):
        PeftModel.from_pretrained(CASES["mlp"].base(), tmp_path)


@pytest.mark.parametrize("coefficients", ["diagonal", "core"])
def test_a_rotation_within_a_cluster_is_refused(coefficients, tmp_path, monkeypatch):
    save(CASES["mlp"], tmp_path, coefficients=coefficients)
    edit(tmp_path, probes={"lin0": [5.0, 0.0, 0.0, 0.0]})
    with pytest.raises(BaseMismatchError, match="nearly equal singular values"):
        PeftModel.from_pretrained(CASES["mlp"].base(), tmp_path)


def test_a_basis_file_in_the_adapter_folder_is_used(tmp_path):
    case = CASES["mlp"]
    trained = save(case, tmp_path / "adapter", coefficients="core")
    SpectralBasis.compute({"lin0.weight": case.base().lin0.weight}, leading=10).save(
        tmp_path / "adapter" / "b.safetensors"
    )
    edit(tmp_path / "adapter", basis="/nowhere/b.safetensors")
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "adapter")
    assert torch.equal(case.output(loaded), case.output(trained))


def test_a_basis_file_is_saved_with_the_adapter(tmp_path):
    case = CASES["mlp"]
    file = SpectralBasis.compute({"lin0.weight": case.base().lin0.weight}, leading=10).save(tmp_path / "b.safetensors")
    trained = case.adapted(basis=str(file), coefficients="core")
    for _ in range(2):  # saving again over it changes nothing
        trained.save_pretrained(tmp_path / "adapter")
    assert trained.peft_config["default"].basis == str(file)
    file.unlink()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path / "adapter")
    assert torch.equal(case.output(loaded), case.output(trained))
    (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"no basis file .* put the file there as basis\.safetensors"):
        loaded.save_pretrained(tmp_path / "again")  # what was trained is not lost


def test_an_adapter_chooses_no_basis_file_outside_of_its_folder(tmp_path):
    save(CASES["mlp"], tmp_path / "adapter")
    weight = CASES["mlp"].base().lin0.weight
    SpectralBasis.compute({"lin0.weight": weight}, leading=10).save(tmp_path / "b.safetensors")
    edit(tmp_path / "adapter", basis=str(tmp_path / "b.safetensors"))
    with pytest.raises(InputError, match=r"no basis file at .*adapter.b\.safetensors"):
        PeftModel.from_pretrained(CASES["mlp"].base(), tmp_path / "adapter")
    (tmp_path / "adapter" / "b.safetensors").symlink_to(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="leads out of"):
        PeftModel.from_pretrained(CASES["mlp"].base(), tmp_path / "adapter")
    (tmp_path / "adapter" / "b.safetensors").unlink()
    edit(tmp_path / "adapter", basis="pretrained")
    config = SpectralConfig.from_pretrained(str(tmp_path / "adapter"))
    config.basis = str(tmp_path / "b.safetensors")  # which a person gives
    PeftModel.from_pretrained(CASES["mlp"].base(), tmp_path / "adapter", config=config)


def test_a_hub_adapter_cannot_point_into_this_machine(tmp_path, monkeypatch):
    save(CASES["mlp"], tmp_path)
    edit(tmp_path, basis=str(tmp_path / "b.safetensors"))
    monkeypatch.setattr("peft.config.hf_hub_download", lambda repo, name, **options: str(tmp_path / name))
    with pytest.raises(InputError, match=r"someone/adapter needs the basis file b.safetensors; download"):
        SpectralConfig.from_pretrained("someone/adapter")


def test_target_modules_that_the_adapter_does_not_know(tmp_path):
    save(CASES["mlp"], tmp_path)
    config = SpectralConfig.from_pretrained(tmp_path)
    config.target_modules = {"lin0", "lin1"}
    with pytest.raises(InputError, match="has no record of lin1"):
        get_peft_model(CASES["mlp"].base(), config)


def test_a_config_can_be_used_on_several_models():
    config = CASES["mlp"].settings()
    asked = config.to_dict()
    first = get_peft_model(CASES["mlp"].base(), config).peft_config["default"]
    torch.manual_seed(7)
    second = get_peft_model(MLP(), config).peft_config["default"]
    assert config.to_dict() == asked
    assert second.base_hashes.keys() == first.base_hashes.keys()
    assert second.base_hashes != first.base_hashes
