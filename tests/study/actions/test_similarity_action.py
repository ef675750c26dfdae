"""The action `similarity` says what `spectralbasis.similarity` says."""

import pytest
import torch
from peft import get_peft_model

from spectralbasis import SpectralConfig, similarity
from spectralbasis.study.actions import similarity as act
from spectralbasis.study.runs import Run, Site
from tests.models import tiny


def test_it_is_the_similarity(tmp_path):
    tiny("bert").save_pretrained(tmp_path / "base")
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for seed, folder in enumerate(folders):
        torch.manual_seed(0)
        config = SpectralConfig(target_modules="all-linear", leading=4, coefficients="core")
        model = get_peft_model(tiny("bert"), config)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "spectral_" in name:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
    needs = {f"adapter_{number}": folder for number, folder in enumerate(folders)}
    result = act(Run("similarity", {"tasks": ["x", "y", "z"]}), Site(None, tmp_path, needs)).result
    expected = similarity(folders, of="coefficients").coefficients.to_numpy()
    assert result["tasks"] == ["x", "y", "z"]
    assert result["cosines"] == expected.tolist()
    assert result["cosines"][0] == pytest.approx([1, expected[0, 1], expected[0, 2]])
    assert abs(expected[0, 1]) < 0.5
