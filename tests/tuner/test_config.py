"""What a config accepts, refuses, and keeps when it is written and read."""

import copy
import dataclasses
import json

import pytest
from peft import PeftConfig

from spectralbasis.errors import InputError
from spectralbasis.tuner import SpectralConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coefficients": "full"}, "coefficients='full' is unknown; choose from 'diagonal', 'core'"),
        ({"bias": "lora_only"}, "bias='lora_only' is unknown; choose from 'none', 'all', 'spectral_only'"),
        ({"leading": 4, "budget": 0.1}, "leading=4 and budget=0.1 both set k; pass one of them"),
        ({"coefficients": "band", "bandwidth": -1}, "bandwidth must be a whole number of at least 0, got -1"),
        ({"coefficients": "block", "block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"coefficients": "rotation", "basis": "random"}, "turn singular vectors, which basis='random' has none of"),
        ({"coefficients": "band", "bandwidth": 1.5}, "bandwidth must be a whole number of at least 0, got 1.5"),
        ({"leading": 0}, "leading=0"),
        ({"leading": 1.5}, "leading=1.5"),
        ({"leading": "many"}, "leading='many'"),
        ({"budget": 0}, "budget must be above 0 and at most 1, got 0"),
        ({"budget": "0.1"}, "budget must be above 0 and at most 1, got '0.1'"),
        ({"budget": 12}, "budget must be above 0 and at most 1, got 12"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern 'q' must be a whole number of at least 1, got 0"),
        ({"rank_pattern": {"q": 0.5}}, "rank_pattern 'q' must be a whole number of at least 1, got 0.5"),
        ({"tolerance": 0}, "got 0; pass a number such as 1e-4"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform cannot be used"),
        ({"target_modules": "q", "layers_pattern": "h"}, "layers_pattern cannot be used with target_modules='q'"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
        ({"task_type": "nonsense"}, "Invalid task type"),
    ],
)  # fmt: skip
def test_refusals_say_what_was_given_and_what_to_type(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        SpectralConfig(**settings)
    assert isinstance(caught.value, InputError) or "task_type" in settings


def settings():
    return SpectralConfig(
        target_modules=["q", "v"], exclude_modules=["k"], coefficients="core", budget=0.01, rank_pattern={"q": 3},
        bandwidth=2, scaling="relative",
        basis="random", basis_seed=4, bias="spectral_only", modules_to_save=["head"], layers_to_transform=[0],
        layers_pattern="h", fan_in_fan_out=True, tolerance=1e-3, init_weights=False,
    )  # fmt: skip


def test_a_config_is_read_as_it_was_written(tmp_path):
    config = settings()
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "adapter_config.json").read_text())
    for kind in (SpectralConfig, PeftConfig):
        assert kind.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("leading", [8, 0.25, "mp", "gd"])
def test_every_kind_of_leading_is_kept(leading, tmp_path):
    SpectralConfig(leading=leading).save_pretrained(tmp_path)
    assert SpectralConfig.from_pretrained(tmp_path).leading == leading


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, dataclasses.replace])
def test_copies_are_equal(duplicate):
    config = settings()
    assert duplicate(config) == config
    assert duplicate(config).to_dict() == config.to_dict()


def test_lists_of_modules_become_sets_and_patterns_stay():
    assert SpectralConfig(target_modules=["q", "q"]).target_modules == {"q"}
    assert SpectralConfig(target_modules="all-linear").target_modules == "all-linear"


def test_a_config_with_hashes_is_bound_to_their_base():
    assert not SpectralConfig().bound
    assert SpectralConfig(base_hashes={"a": "0"}, ranks={"a": 1}, probes={"a": [0.0] * 4}).bound


@pytest.mark.parametrize(
    "record",
    [
        {"base_hashes": {"a": "0"}},
        {"ranks": {"a": 1}},
        {"base_hashes": {"a": "0"}, "ranks": {"b": 1}, "probes": {"a": [0.0] * 4}},
        {"base_hashes": ["a"], "ranks": {"a": 1}, "probes": {"a": [0.0] * 4}},
        {"base_hashes": {"a": "0"}, "ranks": {"a": "1"}, "probes": {"a": [0.0] * 4}},
        {"base_hashes": {"a": "0"}, "ranks": {"a": 0}, "probes": {"a": [0.0] * 4}},
        {"base_hashes": {"a": "0"}, "ranks": {"a": 1}, "probes": {"a": [0.0]}},
    ],
)
def test_a_damaged_record_is_refused(record):
    with pytest.raises(InputError, match=r"restore adapter_config\.json"):
        SpectralConfig(**record)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_modules": 5}, "target_modules is 5, expected a list or a valid string"),
        ({"target_modules": [1]}, r"target_modules\[0\] is 1, expected a valid string"),
        ({"ranks": {"q": 10**9}}, "ranks.q is 1000000000, expected at most 65536"),
        ({"ranks": {"q": True}}, "ranks.q is True, expected a valid integer"),
        ({"probes": {"q": [float("nan")] * 4}}, r"probes.q\[0\] is nan, expected a finite number"),
        ({"bandwidth": -1}, "bandwidth is -1, expected at least 0"),
        ({"coefficients": ["core"]}, r"coefficients is \['core'\], expected"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern.q is 0, expected at least 1"),
        ({"base_model_name_or_path": [1]}, "base_model_name_or_path is .1., expected a valid string"),
    ],
)
def test_a_file_with_fields_of_another_kind_is_refused_in_a_sentence(tmp_path, change, said):
    SpectralConfig(target_modules=["q"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=f"adapter_config.json: {said}"):
        SpectralConfig.from_pretrained(str(tmp_path))
