"""A crew keeps few calls under way, and tries again what died, in the end alone, whatever the executor."""

import re

import pytest

from spectralbasis.execution import ATTEMPTS, Call, Crew, Death, Executor, Failure, Here
from tests.execution import planted


class Scripted(Executor):
    """Ends calls in the order in which they were started; those whose argument is deadly kill their worker."""

    def __init__(self, slots: int, deadly: dict[int, int]) -> None:
        self.deadly = deadly
        self.under_way: list[Call] = []
        self.beside: dict[int, list[int]] = {}
        self.most = 0
        self._slots = slots

    @property
    def workers(self) -> int:
        return self._slots

    def start(self, call: Call) -> int:
        self.under_way.append(call)
        self.most = max(self.most, len(self.under_way))
        self.beside.setdefault(call.arguments[0], []).append(len(self.under_way) - 1)
        return id(call)

    def finished(self) -> list[tuple[int, object]]:
        call = self.under_way.pop(0)
        value = call.arguments[0]
        if self.deadly.get(value, 0) > 0:
            self.deadly[value] -= 1
            return [(id(call), Death("killed"))]
        return [(id(call), call.work(value))]

    def close(self) -> None:
        self.under_way.clear()


def drive(crew, values):
    waiting, found = list(values), {}
    while waiting or crew.keys:
        while waiting and crew.has_room:
            value = waiting.pop(0)
            crew.start(value, planted.double, value)
        found |= dict(crew.finished())
    return found


def test_no_more_calls_are_under_way_than_there_are_slots():
    executor = Scripted(3, {})
    assert drive(Crew(executor), range(50)) == {value: 2 * value for value in range(50)}
    assert executor.most == 3


@pytest.mark.parametrize("deaths", range(1, ATTEMPTS))
def test_a_call_whose_worker_dies_is_tried_again(deaths):
    executor = Scripted(3, {7: deaths})
    assert drive(Crew(executor), range(20)) == {value: 2 * value for value in range(20)}
    assert len(executor.beside[7]) == deaths + 1
    assert all(len(executor.beside[value]) == 1 for value in range(20) if value != 7)


def test_a_deadly_call_ends_as_a_failure_and_costs_no_other():
    executor = Scripted(3, {5: 99, 6: 99})
    found = drive(Crew(executor), range(20))
    assert {value for value, result in found.items() if isinstance(result, Failure)} == {5, 6}
    assert found[5].reason == "tried 3 times, the last time with no other task running: killed"
    assert [found[value] for value in (4, 7)] == [8, 14]
    assert len(executor.beside[5]) == len(executor.beside[6]) == ATTEMPTS
    assert all(len(executor.beside[value]) == 1 for value in range(20) if value not in (5, 6))


def test_the_last_attempt_has_nothing_beside_it():
    executor = Scripted(4, {3: 99, 8: 99})
    drive(Crew(executor), range(20))
    assert executor.beside[3][-1] == executor.beside[8][-1] == 0
    assert max(executor.beside[3] + executor.beside[8]) > 0


def test_what_goes_wrong_here_is_a_failure_too():
    crew = Crew(Here())
    crew.start("bad", planted.fail, KeyError("x"))
    [(key, failure)] = crew.finished()
    assert key == "bad"
    assert re.fullmatch(r"unexpected KeyError in planted\.py, line \d+: 'x'", failure.reason)
    assert crew.finished() == []


def test_too_little_memory_is_tried_again():
    crew = Crew(Here())
    crew.start("large", planted.fail, MemoryError("of 7 GB"))
    [(_, failure)] = crew.finished()
    assert failure.reason.startswith("tried 3 times")
    assert "too little memory (of 7 GB)" in failure.reason
