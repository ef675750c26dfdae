"""The reference pages name what there is: public names, the table's columns and its metrics."""

import re

import torch
from tools.dependencies import ROOT

import spectralbasis as sb

REFERENCE = ROOT / "docs" / "reference"


def test_every_public_name_is_on_the_python_page():
    shown = set(re.findall(r"(?:- |\.)(\w+)$", (REFERENCE / "python.md").read_text(), re.MULTILINE))
    assert set(sb.__all__) - {"__version__"} <= shown


def test_every_column_and_metric_is_defined():
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.fc.weight": torch.randn(12, 10, generator=generator) for i in range(2)}
    tuned = [{name: W + 0.1 * torch.randn(W.shape, generator=generator) for name, W in base.items()} for _ in range(2)]
    result = sb.compare(base, tuned, trailing=True, draws=2)
    whole, sharing = (REFERENCE / "table.md").read_text().split("\n## Sharing\n")
    for table, page in ((result.table, whole), (result.sharing, whole + sharing)):
        assert [name for name in table.columns if f"`{name}`" not in page] == []
        assert [name for name in table.metric.unique() if f"`{name}`" not in page] == []
