"""Every test that asks for a `case` runs on all of them; what a trainer leaves behind is cleared."""

import pytest
from accelerate.state import AcceleratorState

from tests.tuner.cases import CASES, Case


@pytest.fixture(params=CASES, ids=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def own_precision(monkeypatch):
    """A trainer's precision stays in accelerate's state and in the environment, for all that follow."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
