"""Every test that asks for a `case` runs on all of them."""

import pytest

from tests.tuner.cases import CASES, Case


@pytest.fixture(params=CASES, ids=CASES)
def case(request) -> Case:
    return CASES[request.param]
