"""The methods to compare with: what each trains, that it learns, and that what is written reads back the same."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageClassification

from spectralbasis.errors import InputError
from spectralbasis.training import MethodOptions, evaluate, load_model, tune
from spectralbasis.training.methods import Setup, find_method
from tests.training.examples import bright_side_task, save_image_model, save_text_model, write_sst2

SHORT: dict[str, Any] = {"steps": 12, "batch_size": 8, "progress": False}
PEFT: dict[str, dict[str, Any]] = {
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "adalora": {"rank": 2},
    "vera": {"rank": 8},
    "fourierft": {"n_frequency": 20},
    "psoft": {"rank": 4},
    "tinylora": {"dimension": 5},
    "svft": {"coefficients": "band"},
}
OWN: dict[str, dict[str, Any]] = {"bitfit": {}, "subspace": {"dimension": 50}}
BOTTLENECKS: dict[str, dict[str, Any]] = {"houlsby": {"rank": 4}, "parallel": {"rank": 4}}
SHAPES = 2 * [(16, 16), (16, 16), (16, 16), (16, 16), (24, 16), (16, 24)]
HEAD = 2 * 16 + 2
QUICK = {"dora", "svft", *OWN}
"""One method of PEFT, one that trains between singular vectors, and those of this package."""
needs_adapters = pytest.mark.skipif(
    find_spec("adapters") is None, reason="the package adapters works with transformers 4.57 alone: make test-compat"
)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(method, options, id=method, marks=() if method in QUICK else pytest.mark.slow)
        for method, options in {**PEFT, **OWN}.items()
    ],
)
def test_what_is_written_scores_the_same_when_it_is_read_back(tmp_path, method, options):
    model, task = save_image_model(tmp_path / "model"), bright_side_task()
    result = tune(model, task=task, output=tmp_path / "a", method=method, learning_rate=3e-2, **options, **SHORT)
    assert evaluate(model, tmp_path / "a", task=task, progress=False).metrics == result.metrics
    assert result.parameters.backbone > 0
    assert result.parameters.head == HEAD
    assert result.adapter_bytes < (model / "model.safetensors").stat().st_size


@needs_adapters
@pytest.mark.parametrize(("method", "options"), BOTTLENECKS.items())
def test_bottleneck_adapters_read_back_the_same(tmp_path, method, options):
    model, data = save_text_model(tmp_path / "model"), write_sst2(tmp_path / "data")
    text = {**SHORT, "task": "sst2", "data": data, "max_length": 16}
    result = tune(model, output=tmp_path / "a", method=method, learning_rate=1e-2, **options, **text)
    again = evaluate(model, tmp_path / "a", task="sst2", data=data, progress=False)
    assert again.metrics == result.metrics
    assert result.parameters.head == 2 * 32 + 2
    layers = 2 if method == "houlsby" else 1
    assert result.parameters.backbone == 2 * layers * (32 * 4 + 4 + 4 * 32 + 32)


@needs_adapters
def test_fusion_reads_back_without_its_sources(tmp_path):
    model, data = save_text_model(tmp_path / "model"), write_sst2(tmp_path / "data")
    text = {**SHORT, "task": "sst2", "data": data, "max_length": 16}
    sources = [tmp_path / "first", tmp_path / "second"]
    for source, rank in zip(sources, (2, 4), strict=True):
        tune(model, output=source, method="parallel", rank=rank, learning_rate=1e-2, **text)
    fused = tune(model, output=tmp_path / "fused", method="adapterfusion", sources=sources, **text)
    for source in sources:
        source.rename(source.with_suffix(".gone"))
    assert evaluate(model, tmp_path / "fused", task="sst2", data=data, progress=False).metrics == fused.metrics
    trained = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert all("fusion" in name or "classifier" in name for name in trained)
    with pytest.raises(InputError, match="needs at least two adapters, got 1"):
        tune(model, output=tmp_path / "b", method="adapterfusion", sources=[tmp_path / "fused"], **text)
    with pytest.raises(InputError, match="was tuned with adapterfusion; adapterfusion takes houlsby or parallel"):
        tune(model, output=tmp_path / "b", method="adapterfusion", sources=[tmp_path / "fused"] * 2, **text)


def test_bottlenecks_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters", None)
    words = rf"transformers {transformers.__version__}; .* with: pip install 'spectralbasis\[baselines\]'"
    with pytest.raises(InputError, match=words):
        tune(
            save_image_model(tmp_path / "m"), task=bright_side_task(), output=tmp_path / "a", method="houlsby", **SHORT
        )


def trained_sizes(tmp_path, name: str, **options: Any) -> dict[str, int]:
    loaded = load_model(save_image_model(tmp_path / "model"), bright_side_task())
    method = find_method(name)
    model = method.prepare(Setup(loaded, method.complete(MethodOptions(**options)), tmp_path, steps=9))
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {name: size for name, size in trained.items() if "classifier" not in name}


@pytest.mark.parametrize(
    ("method", "options", "size"),
    [
        ("dora", {"rank": 3}, sum(3 * (m + n) + m for m, n in SHAPES)),
        ("pissa", {"rank": 3}, sum(3 * (m + n) for m, n in SHAPES)),
        ("adalora", {"rank": 2}, sum(3 * (m + n) + 3 for m, n in SHAPES)),
        ("vera", {"rank": 5}, sum(m + 5 for m, n in SHAPES)),
        ("fourierft", {"n_frequency": 7}, 7 * len(SHAPES)),
        ("psoft", {"rank": 3}, 9 * len(SHAPES)),
        ("tinylora", {"dimension": 7}, 7 * len(SHAPES)),
        ("svft", {"coefficients": "diagonal"}, 16 * len(SHAPES)),
        ("svft", {"coefficients": "band", "bandwidth": 1}, (16 + 2 * 15) * len(SHAPES)),
        ("subspace", {"dimension": 11}, 11),
    ],
)
def test_the_knob_sets_how_many_numbers_are_trained_in_all_linear_layers(tmp_path, method, options, size):
    assert sum(trained_sizes(tmp_path, method, **options).values()) == size


def test_bitfit_trains_every_bias_and_nothing_else(tmp_path):
    found = trained_sizes(tmp_path, "bitfit")
    assert all(name.endswith(".bias") for name in found)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert set(found) == {name for name, _ in model.named_parameters() if name.endswith("bias")} - {"classifier.bias"}


def test_a_random_subspace_is_the_base_at_first_and_an_isometry_on_average(tmp_path):
    loaded = load_model(save_image_model(tmp_path / "model"), bright_side_task())
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    find_method("subspace").prepare(Setup(loaded, MethodOptions(dimension=40), tmp_path))
    layers = {name: layer for name, layer in loaded.model.named_modules() if isinstance(layer, nn.Linear)}
    layers.pop("classifier")
    assert all(torch.equal(layer.weight, before[f"{name}.weight"]) for name, layer in layers.items())
    z = next(p for name, p in loaded.model.named_parameters() if name.endswith("coordinates.z"))
    with torch.no_grad():
        z.normal_()
        moved = sum((layer.weight - before[f"{name}.weight"]).square().sum() for name, layer in layers.items())
    assert float(moved) == pytest.approx(float(z.square().sum()), rel=0.2)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("svft", {"coefficients": "core"}, "svft has no coefficients 'core'; choose from diagonal, band, sparse"),
        ("subspace", {"dimension": 10**6}, "dimension=1000000 is larger than the"),
        ("fourierft", {"n_frequency": 0}, "n_frequency must be a whole number from 1"),
        ("lora", {"dimension": 4}, "the option dimension does not apply to the method lora"),
        pytest.param("adapterfusion", {}, "needs at least two adapters, got 0", marks=needs_adapters),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, method, options, message):
    with pytest.raises(InputError, match=message):
        tune(
            save_image_model(tmp_path / "model"), task=bright_side_task(), output=tmp_path / "a", method=method,
            **options, **SHORT,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()
