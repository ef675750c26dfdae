"""Adapters of LoRA whose factors or config cannot be right are refused in one sentence; nothing of them is lost."""

import json

import pytest
import torch
from safetensors.torch import save_file

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError

P = "base_model.model.layers.0.q.lora_"
A, B = torch.randn(2, 6), torch.randn(8, 2)
FACTORS = {f"{P}A.weight": A, f"{P}B.weight": B}


@pytest.fixture
def adapter(tmp_path):
    """Writes an adapter over a base of two layers, and opens it."""
    base = {"layers.0.q.weight": torch.randn(8, 6), "layers.1.q.weight": torch.randn(8, 8), "head.weight": torch.eye(3)}
    save_file(base, tmp_path / "base.safetensors")

    def write(tensors, **config):
        settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
        settings["base_model_name_or_path"] = str(tmp_path / "base.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        return open_checkpoint(tmp_path), base

    return write


def test_whole_adapter_is_read(adapter):
    checkpoint, base = adapter(FACTORS)
    torch.testing.assert_close(checkpoint.read("layers.0.q.weight"), base["layers.0.q.weight"] + B @ A)


@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.zeros(0, 6), torch.zeros(8, 0)), (torch.zeros(()), B), (A, torch.zeros(())), (A[0], B[:, 0]),
     (A, B[:, :1]), (A[:, :5], B), (A.int(), B.int()), (A.T, B.T), (A, B.to(torch.complex64))],
)  # fmt: skip
@pytest.mark.parametrize("rslora", [True, False])
def test_factors_of_odd_shapes(adapter, first, second, rslora):
    with pytest.raises(InputError, match=r"layers\.0\.q"):
        adapter({f"{P}A.weight": first.contiguous(), f"{P}B.weight": second.contiguous()}, use_rslora=rslora)


@pytest.mark.parametrize(
    "again",
    [f"{P}A.default.weight", f"{P}A", "layers.0.q.lora_A.weight", "base_model.model.model.layers.0.q.lora_A.weight",
     "base_model.model.base_model.model.layers.0.q.lora_A.default.weight", f"{P}embedding_A"],
)  # fmt: skip
def test_factors_that_are_given_twice(adapter, again):
    with pytest.raises(InputError, match=r"lora_(embedding_)?A|layers\.0\.q\.weight"):
        adapter({**FACTORS, again: torch.zeros(2, 6), again.replace("_A", "_B"): torch.zeros(8, 2)})


@pytest.mark.parametrize("names", [("head.weight", "model.head.weight"), ("model.head.weight", "bert.head.weight")])
def test_retrained_tensors_that_are_one_tensor_of_the_base(adapter, names):
    whole = {f"base_model.model.{name}": torch.randn(3, 3) for name in names}
    with pytest.raises(InputError, match=r"head\.weight.*remove one of them"):
        adapter({**FACTORS, **whole})


def test_copies_of_a_retrained_tensor(adapter):
    own, copy = "base_model.model.head.weight", "base_model.model.head.modules_to_save.default.weight"
    checkpoint, _ = adapter({**FACTORS, own: torch.ones(3, 3), copy: torch.ones(3, 3)})
    assert torch.equal(checkpoint.read("head.weight"), torch.ones(3, 3))
    with pytest.raises(InputError, match=r"two names of one tensor and hold different numbers"):
        adapter({**FACTORS, own: torch.ones(3, 3), copy: torch.zeros(3, 3)})


@pytest.mark.parametrize("switch", ["use_rslora", "use_dora", "fan_in_fan_out"])
@pytest.mark.parametrize("value", ["no", "false", 1, [True]])
def test_switches_are_true_or_false(adapter, switch, value):
    with pytest.raises(InputError, match=f"{switch} is .* expected true or false"):
        adapter(FACTORS, **{switch: value})


@pytest.mark.parametrize("alpha", [float("nan"), 10**400, [1], "2", True, 1e31])
def test_alpha_is_a_number(adapter, alpha):
    with pytest.raises(InputError, match="lora_alpha"):
        adapter(FACTORS, lora_alpha=alpha)


def test_lengths_of_dora_are_one_for_each_row(adapter):
    checkpoint, _ = adapter({**FACTORS, f"{P}magnitude_vector": torch.ones(8)}, use_dora=True)
    torch.testing.assert_close(checkpoint.read("layers.0.q.weight").norm(dim=1), torch.ones(8))
    with pytest.raises(InputError, match="each of the 8 rows"):
        adapter({**FACTORS, f"{P}magnitude_vector": torch.ones(3)}, use_dora=True)


@pytest.mark.parametrize("config", [{"r": 16}, {"rank_pattern": {"q": 16}}])
def test_factors_of_another_rank_than_the_config_says(adapter, config):
    with pytest.raises(InputError, match="belong to different adapters"):
        adapter(FACTORS, **config)


def test_factors_of_a_module_that_the_config_leaves_out_are_told_of(adapter):
    with pytest.warns(UserWarning, match=r"factors of layers\.0\.q, which target_modules"):
        adapter(FACTORS, target_modules=["k"])
