"""A spectral adapter over its base reads as PEFT merges it, and over no other base."""

import json
import pickle
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import spectralbasis
from spectralbasis.checkpoints import logical_matrices, open_checkpoint
from spectralbasis.errors import BaseMismatchError, InputError
from tests.tuner.cases import CASES


def saved(case, tmp_path, **changes):
    """Folder of the adapter, and the merged weights."""
    model = case.adapted(**changes)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", dict(model.merge_and_unload().named_parameters())


def edit_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_equals_merged_model(case, tmp_path):
    adapter, merged = saved(case, tmp_path)
    base = case.base()
    checkpoint = open_checkpoint(adapter, base=base)
    assert set(checkpoint.names()) == {name for name, _ in base.named_parameters(remove_duplicate=False)}
    for name, expected in merged.items():
        assert checkpoint.shape(name) == tuple(expected.shape)
        torch.testing.assert_close(checkpoint.read(name), expected.data, rtol=1e-5, atol=1e-6, msg=name)
    assert any(not torch.equal(checkpoint.read(name), tensor) for name, tensor in base.named_parameters())


def test_biases_trained_with_the_adapter(tmp_path):
    case = CASES["bert"]
    model = case.adapted(bias="spectral_only")
    for name, parameter in model.named_parameters():
        if name.endswith("query.bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path, base=case.base())
    for name, expected in model.merge_and_unload().named_parameters():
        torch.testing.assert_close(checkpoint.read(name), expected.data, rtol=1e-5, atol=1e-6, msg=name)


def test_basis_file_beside_the_adapter(tmp_path):
    case = CASES["bert"]
    file = spectralbasis.SpectralBasis.compute(case.base(), leading=6).save(tmp_path / "basis.safetensors")
    adapter, merged = saved(case, tmp_path, basis=str(file), leading=6)
    (tmp_path / "basis.safetensors").rename(adapter / "basis.safetensors")
    checkpoint = open_checkpoint(adapter, base=case.base())
    name = "bert.encoder.layer.1.attention.self.value.weight"
    torch.testing.assert_close(checkpoint.read(name), merged[name].data, rtol=1e-5, atol=1e-6)


def test_fused_attention_is_read_in_parts(tmp_path):
    case = CASES["gpt2"]
    adapter, merged = saved(case, tmp_path)
    case.base().save_pretrained(tmp_path / "base")
    matrices, _ = logical_matrices(open_checkpoint(adapter, base=tmp_path / "base"))
    fused = merged["transformer.h.1.attn.c_attn.weight"].data.T
    for part, expected in zip(("query", "key", "value"), fused.chunk(3), strict=True):
        torch.testing.assert_close(matrices[f"h.1.attn.c_attn.{part}"].read(), expected, rtol=1e-5, atol=1e-6)


def test_the_base_under_a_head_and_without_one(tmp_path):
    case = CASES["bert"]
    adapter, _ = saved(case, tmp_path)
    under_head, _ = logical_matrices(open_checkpoint(adapter, base=case.base()))
    bare, _ = logical_matrices(open_checkpoint(adapter, base=case.base().bert))
    assert bare.keys() == under_head.keys()
    assert all(torch.equal(matrix.read(), under_head[name].read()) for name, matrix in bare.items())


def test_is_compared_and_travels_between_processes(tmp_path):
    case = CASES["bert"]
    adapter, _ = saved(case, tmp_path, leading=4)
    case.base().save_pretrained(tmp_path / "base")
    checkpoint = open_checkpoint(adapter, base=tmp_path / "base")
    sent = pickle.loads(pickle.dumps(checkpoint))
    result = spectralbasis.compare(tmp_path / "base", [sent], leading=4, null=None)
    table = result.table.set_index(["metric", "matrix", "k"]).value
    assert (table["coverage_core"].xs(4, level="k") > 0.999).all()
    assert len(set(result.table.matrix)) == 4


def test_other_weights_are_refused_at_once_and_on_reading(tmp_path):
    case = CASES["bert"]
    adapter, _ = saved(case, tmp_path)
    other = case.base()
    with torch.no_grad():
        other.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match=r"layer\.0\.attention\.self\.query has hash"):
        open_checkpoint(adapter, base=other)
    later = case.base()
    with torch.no_grad():
        later.bert.encoder.layer[1].attention.self.value.weight[0, 0] += 1e-3
    checkpoint = open_checkpoint(adapter, base=later)
    with pytest.raises(BaseMismatchError, match=r"layer\.1\.attention\.self\.value has hash"):
        checkpoint.read("bert.encoder.layer.1.attention.self.value.weight")


def test_base_of_another_architecture(tmp_path):
    adapter, _ = saved(CASES["bert"], tmp_path)
    with pytest.raises(InputError, match="does not have"):
        open_checkpoint(adapter, base=CASES["gpt2"].base())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_hashes": None}, "base_hashes"),
        ({"ranks": {}}, "base_hashes, ranks and probes"),
        ({"probes": {"lin0": [1.0]}}, "base_hashes, ranks and probes"),
        ({"ranks": {"lin0": 3}}, "belong to different adapters"),
        ({"coefficients": "core"}, "belong to different adapters"),
        ({"coefficients": "band", "bandwidth": 2**70}, "bandwidth is .* expected at most"),
        ({"coefficients": "band", "ranks": {"lin0": 2**40}}, r"ranks\.lin0 is .* expected at most"),
        ({"coefficients": "bold"}, "coefficients is 'bold', expected 'diagonal'"),
        ({"base_hashes": 3}, "base_hashes"),
        ({"rank_pattern": 3}, "rank_pattern is 3, expected an object"),
        ({"basis": "/nowhere/basis.safetensors"}, "no basis file"),
    ],
)
def test_damaged_config(changes, message, tmp_path):
    adapter, _ = saved(CASES["mlp"], tmp_path)
    edit_config(adapter, **changes)
    with pytest.raises(InputError, match=message):
        open_checkpoint(adapter, base=CASES["mlp"].base())


def test_probes_of_other_directions(tmp_path):
    adapter, _ = saved(CASES["mlp"], tmp_path)
    edit_config(adapter, probes={"lin0": [9.0, 9.0, 9.0, 9.0]})
    with pytest.raises(BaseMismatchError, match="directions found for lin0"):
        open_checkpoint(adapter, base=CASES["mlp"].base())


def test_more_directions_than_the_base_has(tmp_path):
    adapter, _ = saved(CASES["mlp"], tmp_path, leading=10)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: torch.ones(30) for name in weights}, adapter / "adapter_model.safetensors")
    edit_config(adapter, ranks={"lin0": 30})
    with pytest.raises(InputError, match="cannot have 30 singular directions"):
        open_checkpoint(adapter, base=CASES["mlp"].base())


FIELDS = ("basis", "basis_seed", "tolerance", "coefficients", "leading", "budget", "rank_pattern", "base_hashes",
          "ranks", "probes", "bandwidth", "scaling", "scales", "entries",
          "target_modules", "bias", "peft_version", "revision", "unknown")  # fmt: skip
WORDS = ["lin0", "minor", "core", "band", "sparse", "block", "rotation", "relative"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["lin0", ""]), inner, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def mlp_adapter(tmp_path_factory):
    return saved(CASES["mlp"], tmp_path_factory.mktemp("fuzz"))[0]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=3))
def test_any_config(mlp_adapter, config):
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of unknown fields
        shutil.copytree(mlp_adapter, folder, dirs_exist_ok=True)
        edit_config(Path(folder), **config)
        try:
            checkpoint = open_checkpoint(folder, CASES["mlp"].base())
            assert checkpoint.read("lin0.weight").shape == (20, 10)
        except (InputError, BaseMismatchError):
            pass
