"""Lists what the package needs at run time, with licences: `python -m tools.dependencies` writes docs/dependencies.md.

It reads what is installed: run it in an environment that was made with constraints.txt.
"""

import re
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = ROOT / "constraints-compat.txt"
PAGE = ROOT / "docs" / "dependencies.md"
PACKAGE = "spectralbasis"
WITH_EXTRAS = f"{PACKAGE}[gguf,study,tune]"
COPYLEFT = re.compile(r"\b(?:A?GPL|GNU (?:Affero )?General Public|SSPL|EUPL|CeCILL)", re.IGNORECASE)
WEAK_COPYLEFT = re.compile(r"\b(?:MPL|LGPL|EPL|Mozilla|GNU Lesser)", re.IGNORECASE)


@dataclass(frozen=True)
class Dependency:
    """An installed package; the licence is empty where the package says nothing of it."""

    name: str
    version: str
    licence: str

    @property
    def is_compatible(self) -> bool:
        """Whether an Apache-2.0 package may depend on it: the licence is known, and asks nothing of its users' code."""
        return bool(self.licence) and not COPYLEFT.search(re.sub(r"\bLGPL|GNU Lesser", "", self.licence))


def runtime_dependencies(package: str = PACKAGE) -> list[Dependency]:
    """What a package needs with the extras that it is named with, and what those packages need, by name."""
    found: dict[str, Distribution] = {}
    wanted = Requirement(package)
    _collect(wanted, found)
    del found[canonicalize_name(wanted.name)]
    return [Dependency(name, one.version, licence(one)) for name, one in sorted(found.items())]


def _collect(wanted: Requirement, found: dict[str, Distribution]) -> None:
    name = canonicalize_name(wanted.name)
    try:
        one = distribution(wanted.name)
    except PackageNotFoundError:
        return
    is_new, found[name] = name not in found, one
    for text in one.requires or ():
        need = Requirement(text)
        extras = wanted.extras or {""}
        if (need.marker is None and is_new) or (
            need.marker is not None
            and any(need.marker.evaluate({"extra": extra}) for extra in extras)
            and (is_new or "extra" in str(need.marker))
        ):
            _collect(need, found)


def licence(one: Distribution) -> str:
    """What a package says of its licence: the SPDX expression, else its classifiers, else its words."""
    metadata = one.metadata
    classified = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or () if "License ::" in text]
    words = (metadata.get("License") or "").strip().partition("\n")[0]
    return metadata.get("License-Expression") or ", ".join(classified) or words


def pins(file: Path = CONSTRAINTS) -> list[tuple[str, str]]:
    """Name and version of every line of a file of constraints, in their order."""
    lines = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
    return [(canonicalize_name(name), version) for name, _, version in (line.partition("==") for line in lines if line)]


def page(dependencies: list[Dependency], more: list[Dependency]) -> str:
    """The page of the documentation: what the package brings, and what its extras `gguf`, `tune` and `study` add."""
    added = [one for one in more if one not in dependencies]
    weak = [one.name for one in more if WEAK_COPYLEFT.search(one.licence)]
    named = (
        f"\nOf these, {', '.join(weak)} are under licences that ask for changes to their own files to be published, "
        "and nothing of code that uses them.\n"
        if weak
        else ""
    )
    return (
        "# Dependencies and their licences\n\n"
        "What `pip install spectralbasis` brings, without extras, at the versions of `constraints.txt`, with PyTorch "
        "for the CPU (the one for GPUs brings NVIDIA's libraries, under NVIDIA's licence). The package itself is under "
        "Apache-2.0. Made by `python -m tools.dependencies`; a test keeps it complete, and refuses a licence that is "
        f"unknown or that Apache-2.0 does not go with.\n\n{_table(dependencies)}\n"
        "The extras `gguf`, `tune` and `study` (`pip install 'spectralbasis[gguf,tune]'`) add:\n\n"
        f"{_table(added)}{named}"
    )


def _table(dependencies: list[Dependency]) -> str:
    rows = [f"| {one.name} | {one.version} | {one.licence} |" for one in dependencies]
    return "\n".join(["| package | version | licence |", "| --- | --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(runtime_dependencies(), runtime_dependencies(WITH_EXTRAS)))
