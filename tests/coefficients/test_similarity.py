"""Cosines of coefficients equal those of the updates they make, and are refused where they would mean nothing."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import spectralbasis as sb
from tests.coefficients.folders import load_base, tokens
from tests.comparison.pairs import random_updates
from tests.models import tiny

CORE = {"target_modules": ["query", "value"], "coefficients": "core", "leading": 4, "init_weights": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "base"
    torch.manual_seed(0)
    tiny("bert", initializer_range=0.2).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """Saves an adapter over the base; gives its folder."""

    def save(name, seed=0, model=base, config=None, **changes):
        loaded = type(tiny("bert")).from_pretrained(model)
        torch.manual_seed(seed)
        adapted = get_peft_model(loaded, config or sb.SpectralConfig(**{**CORE, **changes}))
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.mark.parametrize("coefficients", ["diagonal", "core", "band", "block", "rotation"])
def test_coefficients_and_updates_have_the_same_cosines(adapter, coefficients):
    folders = [adapter(f"a{seed}", seed, coefficients=coefficients) for seed in range(3)]
    found = sb.similarity(folders)
    torch.testing.assert_close(
        torch.tensor(found.coefficients.to_numpy()), torch.tensor(found.updates.to_numpy()), rtol=0, atol=1e-4
    )
    assert found.table["coefficient_cosine"].notna().all()
    difference = found.table["coefficient_cosine"] - found.table["update_cosine"]
    assert difference.abs().max() < 1e-4
    assert found.coefficients.to_numpy().diagonal() == pytest.approx(1)
    assert found.coefficients.loc["a0", "a1"] == found.coefficients.loc["a1", "a0"]
    assert len(found.table) == 3 * 4


def test_an_adapter_is_like_itself_and_opposite_to_its_negative(adapter, tmp_path):
    one = adapter("one")
    tensors = load_file(one / "adapter_model.safetensors")
    (tmp_path / "minus").mkdir()
    shutil.copy(one / "adapter_config.json", tmp_path / "minus")
    save_file({name: -2 * tensor for name, tensor in tensors.items()}, tmp_path / "minus" / "adapter_model.safetensors")
    found = sb.similarity([one, one, tmp_path / "minus"], of="coefficients")
    expected = [[1, 1, -1], [1, 1, -1], [-1, -1, 1]]
    torch.testing.assert_close(torch.tensor(found.coefficients.to_numpy()), torch.tensor(expected, dtype=torch.float64))
    assert found.updates is None


def test_fewer_directions_and_fewer_matrices_count_as_zero(adapter):
    few, many = adapter("few", 1, leading=2, target_modules=["query"]), adapter("many", 2)
    found = sb.similarity([few, many])
    assert found.coefficients.loc["few", "many"] == pytest.approx(found.updates.loc["few", "many"], abs=1e-4)
    values = found.table[found.table["matrix"].str.endswith("value")]
    assert values["coefficient_cosine"].isna().all()
    assert found.table["coefficient_cosine"].notna().sum() == 2


def test_coefficients_alone_need_no_base(adapter, base, tmp_path):
    folders = [adapter(f"a{seed}", seed) for seed in range(2)]
    expected = sb.similarity(folders).coefficients
    for folder in folders:
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    pd.testing.assert_frame_equal(sb.similarity(folders, of="coefficients").coefficients, expected)
    with pytest.raises(sb.InputError, match="gone"):
        sb.similarity(folders)
    assert sb.similarity(folders, base=base).updates is not None


def test_lora_and_full_checkpoints_have_updates_only(adapter, base):
    lora = adapter("lora", config=LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    found = sb.similarity([adapter("spectral"), lora])
    assert found.coefficients is None
    assert -1 < found.updates.loc["spectral", "lora"] < 1
    assert found.to_dict()["pairs"][0]["coefficients"] is None
    with pytest.raises(sb.InputError, match="not a spectral adapter's folder"):
        sb.similarity([adapter("other"), lora], of="coefficients")


def test_full_checkpoints_need_their_base():
    start, one = random_updates(2, 0.3)
    half = {name: start[name] + 0.5 * (one[name] - start[name]) for name in start}
    found = sb.similarity([one, half], base=start)
    assert found.updates.to_numpy()[0, 1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(sb.InputError, match="pass the pretrained model"):
        sb.similarity([one, half])
    with pytest.raises(sb.InputError, match="the same weights"):
        sb.similarity([start, start], base=start)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coefficients": "diagonal"}, "one trains core coefficients, the other diagonal"),
        ({"basis": "minor"}, "the basis pretrained, the other minor"),
        ({"target_modules": ["key"]}, "no matrix in common"),
    ],
)
def test_coefficients_that_mean_different_things_are_refused(adapter, change, message):
    folders = [adapter("one"), adapter("two", **change)]
    with pytest.raises(sb.InputError, match=message):
        sb.similarity(folders)
    assert math.isfinite(sb.similarity(folders, of="updates").to_dict()["pairs"][0]["updates"])


def test_another_base_or_other_directions_are_refused(adapter, base, tmp_path):
    torch.manual_seed(5)
    tiny("bert", initializer_range=0.2).save_pretrained(tmp_path / "other")
    one, two = adapter("one"), adapter("two", model=tmp_path / "other")
    with pytest.raises(sb.InputError, match="of their bases differs"):
        sb.similarity([one, two])
    three = adapter("three", 3)
    config = json.loads((three / "adapter_config.json").read_text())
    for probe in config["probes"].values():
        probe[0] += 1
    (three / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(sb.InputError, match="different directions"):
        sb.similarity([one, three], of="coefficients")


def test_damaged_adapters_and_odd_requests_are_sentences(adapter):
    one = adapter("one")
    with pytest.raises(sb.InputError, match="two or more"):
        sb.similarity([one])
    with pytest.raises(sb.InputError, match="of='cosines' is unknown"):
        sb.similarity([one, one], of="cosines")
    two = adapter("two")
    save_file({"base_model.model.x.spectral_coefficients.weight": torch.ones(4, 4)}, two / "adapter_model.safetensors")
    with pytest.raises(sb.InputError, match="does not describe the coefficients of x"):
        sb.similarity([one, two])


def test_files_hold_what_the_result_says(adapter, tmp_path):
    found = sb.similarity([adapter("one", 1), adapter("two", 2)], output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "similarity.json").read_text()) == found.to_dict()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "similarity.parquet"), found.table)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [".spectralbasis", "similarity.json", "similarity.parquet"]


@pytest.fixture
def renamed(adapter):
    """The same adapter twice, once as a release of transformers that calls its modules otherwise would save it."""
    one, two = adapter("one", 1), adapter("two", 1)
    names = {"attention.self.": "attention.", "encoder.layer.": "layers."}

    def rename(text: str) -> str:
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    file = two / "adapter_model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(dict(reversed(tensors.items())), file)
    config = two / "adapter_config.json"
    config.write_text(rename(config.read_text()))
    return one, two


def test_matrices_are_known_by_their_weights_whatever_they_are_called(renamed, tmp_path):
    found = sb.similarity(renamed, of="coefficients")
    assert found.coefficients.to_numpy() == pytest.approx(1)
    assert found.table["coefficient_cosine"].to_numpy() == pytest.approx(1)
    sb.combine(renamed, [0.75, -0.5], output=tmp_path / "both")
    ours = load_file(tmp_path / "both" / "adapter_model.safetensors")
    for name, tensor in load_file(renamed[0] / "adapter_model.safetensors").items():
        torch.testing.assert_close(ours[name], tensor / 4)


def test_an_adapter_with_other_names_loads_where_its_weights_are(renamed, base):
    one, two = (PeftModel.from_pretrained(load_base(base, ""), folder).eval() for folder in renamed)
    expected = one(**tokens()).last_hidden_state
    assert (expected - load_base(base, "")(**tokens()).last_hidden_state).abs().max() > 1e-3
    assert torch.equal(two(**tokens()).last_hidden_state, expected)
    two.save_pretrained(base.parent / "again")
    assert sb.similarity([renamed[0], base.parent / "again"]).updates.to_numpy() == pytest.approx(1)
    bank = sb.CoefficientBank.from_adapters(load_base(base, ""), {"two": renamed[1], "one": renamed[0]})
    torch.testing.assert_close(
        bank(**tokens(2), tasks=["one", "two"]).last_hidden_state, one(**tokens(2)).last_hidden_state
    )


def test_a_file_that_lacks_matrices_of_its_record_is_refused(adapter, base, tmp_path):
    one, two = adapter("one"), adapter("two")
    file = one / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "query" in name)]
    save_file(tensors, file)
    for use in (
        lambda: sb.similarity([two, one], of="coefficients"),
        lambda: sb.combine([one], output=tmp_path / "combined"),
        lambda: sb.export_lora(one, tmp_path / "lora"),
        lambda: sb.export_merged(one, tmp_path / "merged"),
        lambda: sb.open_checkpoint(one),
        lambda: sb.CoefficientBank.from_adapters(load_base(base, ""), {"one": one}),
    ):
        with pytest.raises(sb.InputError, match=r"no coefficients of .*query \(1 of"):
            use()
