"""What an adapter folder holds."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from spectralbasis.tuner import SpectralConfig
from tests.tuner.cases import CASES


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_save_and_load(case, tmp_path, safe_serialization, recwarn):
    model = case.adapted()
    model.add_adapter("other", case.settings())
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    loaded = PeftModel.from_pretrained(case.base(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    assert torch.equal(case.output(loaded), case.output(model))
    assert not any("missing adapter keys" in str(warning.message) for warning in recwarn)
    weights = "adapter_model.safetensors" if safe_serialization else "adapter_model.bin"
    for folder, extra in ((tmp_path, {"README.md", "other"}), (tmp_path / "other", set())):
        assert {file.name for file in folder.iterdir()} == {weights, "adapter_config.json"} | extra


def test_only_selected_adapters_are_saved(tmp_path):
    model = CASES["mlp"].adapted()
    expected = get_peft_model_state_dict(model).keys()
    for name in ("default2", "other_default", "foodefault_bar", "efaul"):
        model.add_adapter(name, CASES["mlp"].settings())
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == expected
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize("names", [("default", "default2", "ault"), ("a", "ab", "b"), ("spec", "lin", "l")])
@pytest.mark.parametrize("safe_serialization", [True, False])
def test_names_that_are_parts_of_others(names, safe_serialization, tmp_path):
    case = CASES["mlp, head"]
    model = case.adapted(adapter_name=names[0])
    for seed, name in enumerate(names[1:]):
        torch.manual_seed(seed)
        model.add_adapter(name, case.settings())
        torch.nn.init.normal_(model.base_model.model.lin1.modules_to_save[name].weight)
    model.save_pretrained(tmp_path, safe_serialization=safe_serialization)
    for name in names:
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(case.base(), tmp_path if name == "default" else tmp_path / name)
        assert torch.equal(case.output(loaded), case.output(model))


def test_a_config_that_is_given_for_loading_is_completed_in_a_copy(tmp_path):
    case = CASES["mlp"]
    model = case.adapted()
    model.save_pretrained(tmp_path)
    config = case.settings()
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=False, config=config)
    assert loaded.peft_config["default"].ranks == model.peft_config["default"].ranks
    assert loaded.peft_config["default"].inference_mode
    assert config.ranks is None


def test_an_adapter_is_a_few_kilobytes(tmp_path):
    model = CASES["llama"].adapted(coefficients="diagonal", leading=16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape for tensor in tensors.values()} == {(16,)}
    header = 160 * len(tensors)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 16 * len(tensors) + header


def test_the_config_records_hashes_ranks_and_probes(tmp_path):
    model = CASES["bert"].adapted(leading=4)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    names = {f"encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in ("query", "value")}
    assert saved["base_hashes"].keys() == saved["probes"].keys() == names
    assert saved["ranks"] == dict.fromkeys(names, 4)
    assert saved["coefficients"] == "diagonal"
    assert saved["peft_type"] == "SPECTRAL"
    assert all(len(value) == 32 for value in saved["base_hashes"].values())
    assert type(PeftConfig.from_pretrained(tmp_path)) is SpectralConfig


def test_the_model_card_says_what_to_import_once(tmp_path):
    model = CASES["mlp"].adapted()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("\nimport spectralbasis\n") == 1
    assert "library_name: peft" in card


def test_an_existing_model_card_keeps_its_text(tmp_path):
    (tmp_path / "README.md").write_text("---\nmeta: hello\n---\nThis is mine")
    CASES["mlp"].adapted().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "meta: hello" in card
    assert "This is mine" in card
    assert "import spectralbasis" in card
