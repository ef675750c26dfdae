"""Patterns out of files: they mean what they mean to PEFT, and none keeps the program busy."""

import time
from types import SimpleNamespace

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from spectralbasis import records
from spectralbasis.errors import InputError
from spectralbasis.records import excludes, expression, names_only, pattern_of, targets

NAMES = [
    "embed",
    "layers",
    *(f"model.layers.{n}.{part}" for n in (0, 1, 12) for part in ("q", "mlp.up", "mlp.experts.3.q", "norm")),
    "head.0.q",
    "classifier",
]
SLOW = r"(?:(\w|\w\w)+\.?)+[!?]"  # takes time that doubles with each letter
CONFIGS = {
    "names": {"target_modules": ["q", "mlp.up"]},
    "an expression": {"target_modules": r".*\.[01]\..*(q|up)"},
    "layers": {"target_modules": ["q", "up"], "layers_to_transform": [0, 12]},
    "one layer": {"target_modules": ["q"], "layers_to_transform": 1},
    "layers of a name": {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "named layers": {"target_modules": ["q"], "layers_to_transform": [3], "layers_pattern": ["experts"]},
    "left out": {"target_modules": ["q"], "exclude_modules": ["experts.3.q"]},
    "left out by an expression": {"target_modules": ["q"], "exclude_modules": r".*layers\.\d\..*"},
    "trained in full": {"target_modules": ["q", "classifier"], "modules_to_save": ["classifier", "mlp"]},
}


def meant(config, names=NAMES):
    return {name for name in names if check_target_module_exists(config, name)}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_means_what_it_means_to_peft(case):
    config = LoraConfig(**CONFIGS[case])
    found = {name: check_target_module_exists(config, name) for name in NAMES}
    assert any(found.values())
    assert {name for name in NAMES if targets(config, name) and not excludes(config, name)} == meant(config)
    left_out = {name for name, one in found.items() if isinstance(one, _ExcludedModule)}
    assert {name for name in NAMES if excludes(config, name)} == left_out


@pytest.mark.parametrize("case", CONFIGS)
def test_names_in_place_of_patterns_mean_the_same(case):
    config = LoraConfig(**CONFIGS[case], rank_pattern={r"layers\.1\.q": 3, "q": 5, r".*up": 7}, alpha_pattern={"up": 9})
    before = {name: get_pattern_key(config.rank_pattern, name) for name in meant(config)}
    expected = {name: config.rank_pattern.get(key, config.r) for name, key in before.items()}
    alpha = {name: config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), 8) for name in before}
    names_only(config, NAMES)
    assert isinstance(config.target_modules, set)
    assert meant(config) == set(expected)
    for values, wanted, default in ((config.rank_pattern, expected, config.r), (config.alpha_pattern, alpha, 8)):
        assert {name: values.get(get_pattern_key(values, name), default) for name in wanted} == wanted


def test_the_first_pattern_for_the_end_of_a_name_counts():
    assert pattern_of(["1.q", "q", r"layers\.\d+\.q"], "model.layers.12.q") == "q"
    assert pattern_of(["v"], "model.layers.12.q") is None


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": SLOW},
        {"target_modules": ["q"], "exclude_modules": SLOW},
        {"target_modules": ["q"], "rank_pattern": {SLOW: 2}},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": [SLOW]},
        {"target_modules": ["q"], "modules_to_save": [SLOW]},
    ],
    ids=lambda field: ", ".join(field),
)
def test_a_pattern_that_backtracks_for_ever_is_refused_in_time(field, monkeypatch):
    monkeypatch.setattr(records, "SECONDS", 0.2)
    records.expression.cache_clear()
    config = LoraConfig(**field)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"takes more than 0\.2 seconds to match|expected names of modules"):
        names_only(config, [f"model.layers.0.{'abcdefgh' * 8}.q", *NAMES])
    assert time.monotonic() - started < 5


def test_slow_matches_share_one_limit(monkeypatch):
    monkeypatch.setattr(records, "SECONDS", 0.2)
    monkeypatch.setattr(records, "_SLOW", 0)
    one = records.Expression(SLOW)
    with pytest.raises(InputError, match="takes more than"):
        list(map(one.matches, ["a" * 20] * 10_000))


@pytest.mark.parametrize(("pattern", "message"), [("(q", "not a regular expression"), ("q" * 200_000, "too long")])
def test_what_is_no_expression_is_a_sentence(pattern, message):
    with pytest.raises(InputError, match=message):
        expression(pattern)
    with pytest.raises(InputError, match=message):
        names_only(SimpleNamespace(target_modules=pattern), NAMES)


def test_a_pattern_for_no_module_is_refused():
    with pytest.raises(InputError, match="target_modules='nothing' matches no module"):
        names_only(LoraConfig(target_modules="nothing"), NAMES)


@pytest.mark.parametrize("pattern", ["(q_prxj){e<=2}", "q_[[:alpha:]]+", "(?p)a|ab", "a{x}"])
def test_what_libraries_read_differently_is_refused(pattern):
    with pytest.raises(InputError, match=r"not a regular expression|not a count"):
        expression(pattern)


def test_counts_and_braces_that_stand_for_themselves():
    assert expression(r"layers\.\d{1,2}\.q\{0\}").matches("layers.12.q{0}")
