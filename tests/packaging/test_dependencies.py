"""What the package brings with it is pinned, listed, and under licences that go with its own."""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tools.dependencies import (
    CONSTRAINTS,
    OLDEST,
    PAGE,
    ROOT,
    WITH_EXTRAS,
    Dependency,
    page,
    pins,
    runtime_dependencies,
)

import spectralbasis as sb

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dependencies():
    return runtime_dependencies(WITH_EXTRAS)


def test_all_that_is_required_is_found(dependencies):
    assert {canonicalize_name(need.name) for need in needs("gguf", "tune", "study")} <= {
        one.name for one in dependencies
    }


def test_without_extras_nothing_comes_that_only_tuning_needs():
    assert {"datasets", "h5py", "scikit-learn"}.isdisjoint(one.name for one in runtime_dependencies())


def test_every_licence_is_known_and_goes_with_ours(dependencies):
    assert [one for one in dependencies if not one.is_compatible] == []


@pytest.mark.parametrize(
    ("licence", "compatible"),
    [
        ("Apache-2.0 AND MIT", True),
        ("MPL-2.0", True),
        ("LGPL-2.1-or-later", True),
        ("GNU Lesser General Public License v3 (LGPLv3)", True),
        ("GPL-3.0-only", False),
        ("GNU General Public License v2 (GPLv2)", False),
        ("AGPL-3.0", False),
        ("", False),
    ],
)
def test_licences_are_judged(licence, compatible):
    assert Dependency("one", "1", licence).is_compatible is compatible


def test_every_runtime_package_is_pinned_once_at_the_version_that_is_tested(dependencies):
    pinned = dict(pins())
    assert [one.name for one in dependencies if one.name not in pinned] == []
    assert {one.name: one.version for one in dependencies if Version(one.version).public != pinned[one.name]} == {}


@pytest.mark.parametrize("file", [CONSTRAINTS, OLDEST], ids=lambda file: file.name)
def test_no_package_is_pinned_twice(file):
    assert [name for name, count in Counter(name for name, _ in pins(file)).items() if count > 1] == []


def needs(*extras):
    """What the project asks for, without extras and with these."""
    optional = PROJECT["optional-dependencies"]
    return [
        Requirement(text) for text in [*PROJECT["dependencies"], *(text for one in extras for text in optional[one])]
    ]


def test_pins_satisfy_what_the_project_asks_for():
    pinned = dict(pins())
    others = set(PROJECT["optional-dependencies"]) - {"baselines"}  # which needs transformers 4
    for need in needs(*others):
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need


def test_every_range_starts_at_the_version_that_is_tested_as_the_oldest():
    oldest = dict(pins(OLDEST))
    for need in needs("baselines", "gguf", "images", "integrations", "minilm", "sentencepiece", "study", "tune"):
        (least,) = need.specifier
        assert least.operator == ">="
        release = Version(least.version).release
        if need.name != "torch":  # its older wheels are too large to test with at each change
            assert Version(oldest[canonicalize_name(need.name)]).release[: len(release)] == release, need


@pytest.mark.slow
def test_installed_packages_fit_each_other():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the page is made with Python 3.11")
def test_the_page_lists_what_is_there(dependencies):
    assert PAGE.read_text() == page(runtime_dependencies(), dependencies), "run python -m tools.dependencies"


def test_the_version_is_semantic_and_the_changelog_speaks_of_it():
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:-[0-9A-Za-z.]+)?", sb.__version__)
    assert version("spectralbasis") == sb.__version__
    assert re.search(rf"^## {re.escape(sb.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
