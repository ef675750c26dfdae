"""The guide's table names tests that are there."""

import re
from pathlib import Path


def test_every_habit_is_shown_by_a_test():
    root = Path(__file__).parents[2]
    rows = [line.split("|")[1:-1] for line in (root / "docs" / "peft.md").read_text().splitlines() if line[:2] == "| "]
    assert len(rows) > 15
    for habit, _, shown in rows[2:]:
        named = re.findall(r"test_\w+\.py", shown)
        assert named, habit
        for name in named:
            assert (root / "tests" / "tuner" / name).is_file(), name
