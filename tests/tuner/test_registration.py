"""PEFT knows the method after the import, once."""

import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from spectralbasis.peft_import import add_peft_type, register
from spectralbasis.tuner import SpectralConfig, SpectralModel


def test_the_enum_has_a_full_member():
    member = PeftType("SPECTRAL")
    assert member is PeftType.SPECTRAL is PeftType["SPECTRAL"]
    assert (member.name, member.value, member) == ("SPECTRAL", "SPECTRAL", "SPECTRAL")
    assert member in PeftType
    assert list(PeftType).count(member) == 1
    assert isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert repr(member) == "<PeftType.SPECTRAL: 'SPECTRAL'>"


def test_the_mappings_lead_to_our_classes():
    member = PeftType.SPECTRAL
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SpectralConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["SPECTRAL"] is SpectralModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "spectral_"
    assert SpectralConfig().peft_type is member


def test_registering_again_changes_nothing():
    before = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register(SpectralConfig, SpectralModel)
    add_peft_type("LORA")
    assert before == (list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING))


@pytest.mark.slow
def test_the_package_registers_on_import():
    program = "import spectralbasis, peft; print(peft.PeftType('SPECTRAL').value)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "SPECTRAL", result.stderr
