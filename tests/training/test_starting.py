"""Training from the trained numbers of another adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from spectralbasis.errors import InputError
from spectralbasis.training import tune
from spectralbasis.training.quickstart import save_untrained
from tests.training.examples import bright_side_task, save_image_model

SHORT = {"steps": 3, "batch_size": 8, "progress": False}
TINY = {"learning_rate": 1e-12, "head_learning_rate": 1e-12}
METHODS = [
    {"method": "spectral", "coefficients": "core", "leading": 3},
    {"method": "lora", "rank": 2},
    {"method": "pissa", "rank": 2},
    {"method": "bitfit"},
    {"method": "subspace", "dimension": 9},
]


@pytest.fixture
def model(tmp_path):
    return save_image_model(tmp_path / "model")


@pytest.mark.parametrize("options", METHODS, ids=lambda options: options["method"] + options.get("coefficients", ""))
def test_the_backbone_starts_where_the_other_ended_and_the_head_afresh(tmp_path, model, options):
    task = bright_side_task()
    tune(model, task=task, output=tmp_path / "first", learning_rate=1e-2, **options, **SHORT)
    tune(model, task=task, output=tmp_path / "next", start=tmp_path / "first", seed=1, **options, **SHORT, **TINY)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "next"))
    for name, tensor in first.items():
        close = torch.allclose(tensor, second[name], atol=1e-8)
        assert close == (not name.endswith("classifier.weight")) or "classifier.bias" in name


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"method": "lora", "rank": 2}, {"method": "dora", "rank": 2}, "was tuned with lora, not dora"),
        ({"method": "lora", "rank": 2}, {"method": "lora", "rank": 3}, "its r is 2, and here it is 3"),
        (
            {"method": "lora", "rank": 2, "alpha": 1},
            {"method": "lora", "rank": 2},
            "its lora_alpha is 1, and here it is 4",
        ),
        ({"coefficients": "sparse"}, {"coefficients": "sparse", "seed": 1}, "do not fit this model"),
        ({"leading": 3}, {"leading": 3, "basis": "random"}, "its probes is "),
        ({"leading": 3}, {"leading": 3, "scaling": "relative"}, "do not fit this model"),
        ({"leading": 3}, {"leading": 4}, "do not fit this model"),
        ({"method": "bitfit"}, {"method": "full"}, "the method full starts from a whole model"),
        (
            {"method": "subspace", "dimension": 9},
            {"method": "subspace", "dimension": 8},
            r"does not fit: .*z of \(8,\)",
        ),
        ({"method": "full"}, {"method": "bitfit"}, "was tuned with full, not bitfit"),
    ],
)
def test_numbers_that_would_mean_something_else_are_refused(tmp_path, model, first, second, message):
    task = bright_side_task()
    tune(model, task=task, output=tmp_path / "first", **first, **SHORT)
    with pytest.raises(InputError, match=message):
        tune(model, task=task, output=tmp_path / "next", start=tmp_path / "first", **second, **SHORT)
    assert not (tmp_path / "next").exists()


def test_random_bases_are_drawn_by_a_seed_of_their_own(tmp_path):
    base = save_untrained(tmp_path / "vit")
    options = {"task": "digits", "basis": "random", "leading": 4, "steps": 1, "progress": False}
    for seed in (0, 3):
        tune(base, output=tmp_path / str(seed), basis_seed=seed, **options)
        assert json.loads((tmp_path / str(seed) / "adapter_config.json").read_text())["basis_seed"] == seed
