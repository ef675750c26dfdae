"""The guide's table names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_habit_is_shown_by_a_test():
    section = (ROOT / "docs" / "peft.md").read_text().partition("\n## What works\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) > 15
    for habit, _, shown in rows[2:]:
        named = re.findall(r"test_\w+\.py", shown)
        assert named, habit
        for name in named:
            assert (ROOT / "tests" / "tuner" / name).is_file(), name
