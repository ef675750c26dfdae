"""The public workflow runs the commands that `.ci/run` runs, on the Pythons that the package names."""

import re
import tomllib

import yaml
from tools.dependencies import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands():
    return [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def test_it_makes_what_ci_makes():
    made = re.findall(r"^make (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert made
    for target in " ".join(made).split():
        assert f"make {target}" in commands()


def test_every_target_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {command.removeprefix("make ") for command in commands() if command.startswith("make ")} <= targets


def test_it_tries_every_python_that_the_package_names():
    named = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text}
    for job in ("test", "wheel"):
        assert set(WORKFLOW["jobs"][job]["strategy"]["matrix"]["python"]) == named


def test_no_job_may_write():
    assert WORKFLOW["permissions"] == {"contents": "read"}
