"""What each method trains, and which options it takes."""

import pytest
from torch import nn

from spectralbasis.errors import InputError
from spectralbasis.training import METHODS, MethodOptions, load_model
from spectralbasis.training.methods import DEFAULT_SCALING, Setup, find_method, methods_in_words
from spectralbasis.training.outcomes import ParameterCounts
from spectralbasis.tuner import factors
from tests.training.examples import bright_side_task, save_image_model

HEAD = 2 * 16 + 2
SHAPES = 2 * [(16, 16), (16, 16), (16, 16), (16, 16), (24, 16), (16, 24)]


def counts(tmp_path, name, **options):
    loaded = load_model(save_image_model(tmp_path / "model"), bright_side_task())
    total = sum(p.numel() for p in loaded.model.parameters())
    method = find_method(name)
    model = method.prepare(Setup(loaded, method.complete(MethodOptions(**options)), tmp_path))
    return ParameterCounts.of(model, loaded.head, total)


def test_full_trains_all_and_head_trains_the_head(tmp_path):
    full = counts(tmp_path, "full")
    assert (full.backbone + full.head, full.head) == (full.model, HEAD)
    head = counts(tmp_path, "head")
    assert (head.backbone, head.head, head.model) == (0, HEAD, full.model)
    assert head.share_head == HEAD / full.model


def test_lora_trains_two_factors_in_every_linear_layer_of_the_backbone(tmp_path):
    lora = counts(tmp_path, "lora", rank=3)
    assert (lora.backbone, lora.head) == (3 * sum(m + n for m, n in SHAPES), HEAD)


@pytest.mark.parametrize(
    ("coefficients", "size"), [("diagonal", 5), ("core", 25), ("block", 9 + 4), ("rotation", 5 + 3 + 1)]
)
def test_spectral_trains_coefficients_in_every_linear_layer_of_the_backbone(tmp_path, coefficients, size):
    spectral = counts(tmp_path, "spectral", coefficients=coefficients, leading=5, **size_of(coefficients))
    assert (spectral.backbone, spectral.head) == (size * len(SHAPES), HEAD)


def size_of(coefficients):
    return {"block_size": 3} if coefficients in ("block", "rotation") else {}


@pytest.mark.parametrize(
    ("also", "size"),
    [
        (("biases",), sum(m for m, _ in SHAPES)),
        (("norms",), 2 * 16 * 5),
        (("norms", "biases"), 2 * 16 * 5 + sum(m for m, _ in SHAPES)),
    ],
)
def test_biases_and_norms_are_counted_in_the_backbone(tmp_path, also, size):
    found = counts(tmp_path, "spectral", coefficients="diagonal", leading=5, also=also)
    assert (found.backbone, found.head) == (5 * len(SHAPES) + size, HEAD)


def test_what_else_could_be_trained_is_listed():
    with pytest.raises(InputError, match="also='heads' is unknown; choose from 'biases', 'norms'"):
        MethodOptions(also=("heads",))


@pytest.mark.parametrize(("also", "message"), [("biases", "have no biases to train"), ("norms", "has no layer norms")])
def test_a_model_without_them_is_told_so(tmp_path, also, message):
    loaded = load_model(save_image_model(tmp_path / "model"), bright_side_task())
    for module in loaded.model.modules():
        if isinstance(module, nn.Linear):
            module.bias = None
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, nn.Identity())
    method = find_method("spectral")
    with pytest.raises(InputError, match=message):
        method.prepare(Setup(loaded, method.complete(MethodOptions(also=(also,))), tmp_path))


def test_a_budget_is_a_share_of_the_model_that_spectral_keeps_within(tmp_path):
    spectral = counts(tmp_path, "spectral", coefficients="core", budget=0.05)
    assert 0.03 < spectral.share_backbone <= 0.05


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"leading": 4}, "the option leading does not apply to the method lora; it belongs to spectral"),
        ("spectral", {"rank": 4}, "the option rank does not apply to the method spectral; it belongs to lora, dora"),
        ("full", {"coefficients": "core"}, "the option coefficients does not apply to the method full"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        find_method(name).complete(MethodOptions(**options))


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(InputError, match="unknown method 'adapter'; the known ones are spectral, svft") as caught:
        find_method("adapter")
    assert str(caught.value).endswith(methods_in_words())
    assert all(name in methods_in_words() for name in METHODS)


def test_the_default_unit_is_the_tuners():
    assert DEFAULT_SCALING == factors.DEFAULT_SCALING


def test_learning_rates_that_are_given_win_over_the_defaults():
    lora, head = METHODS["lora"], METHODS["head"]
    default, default_head = lora.learning_rates(None, None)
    assert lora.learning_rates(7.0, None) == (7.0, default_head)
    assert lora.learning_rates(None, 7.0) == (default, 7.0)
    assert head.learning_rates(7.0, None) == (7.0, 7.0)
    assert head.learning_rates(None, None)[1] > 0
