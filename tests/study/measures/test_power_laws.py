"""Exponents come from weightwatcher, matched to matrices by name; here a stand-in gives them."""

import sys
from types import SimpleNamespace

import pandas as pd
import pytest

from spectralbasis.errors import InputError
from spectralbasis.study import estimates
from tests.models import tiny


class Watcher:
    """Says what weightwatcher says: one row a layer, by a number and the module's name."""

    def __init__(self, model):
        self.names = [name for name, module in model.named_modules() if hasattr(module, "weight")]

    def describe(self):
        return pd.DataFrame({"layer_id": range(len(self.names)), "longname": self.names})

    def analyze(self, layers):
        alphas = [-1.0 if number == layers[0] else 2.0 + number for number in layers]
        return pd.DataFrame({"longname": [self.names[number] for number in layers], "alpha": alphas})


def test_layers_are_found_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "weightwatcher", SimpleNamespace(WeightWatcher=Watcher, __spec__=object()))
    model = tiny("bert", "classifier")
    wanted = {"encoder.layer.0.output.dense", "encoder.layer.1.output.dense", "encoder.layer.1.attention.self.key"}
    found = estimates.power_law_exponents(model, wanted)
    names = Watcher(model).names
    # The first has no fit.
    assert set(found) == wanted - {"encoder.layer.0.output.dense"}
    assert found["encoder.layer.1.output.dense"] == 2.0 + names.index("bert.encoder.layer.1.output.dense")
    assert estimates.power_law_exponents(model, {"elsewhere"}) == {}


def test_without_the_package_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "weightwatcher", None)
    with pytest.raises(InputError, match="diagnostics"):
        estimates.power_law_exponents(tiny("bert"), set())
