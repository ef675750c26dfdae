"""Imports go one way: each floor of the package imports from the floors below it, and no module imports in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import spectralbasis

ROOT = Path(spectralbasis.__file__).parent
FLOORS = (
    {"version", "errors", "printable", "sizes", "records", "files", "databases", "execution", "working_folder",
     "peft_import", "doctor", "extras", "locations", "kinds"},
    {"linalg"}, {"checkpoints"}, {"triplets", "basis"}, {"comparison", "tuner"}, {"coefficients"}, {"report"},
    {"training"}, {"study"}, {"commands"}, {"cli"},
)  # fmt: skip
UPWARDS = {("comparison.comparing", "report")}
"""`Comparison.report` writes the page of a result, by an import within the method."""
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports, also within functions, or by their name."""
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for file in ROOT.rglob("*.py")
        if file.parent != ROOT or file.stem not in ("__init__", "__main__")
    }
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        names = set()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and str(node.value).removeprefix("spectralbasis.") in files:
                names.add(str(node.value))  # a module that is imported by its name
        ours = {name.removeprefix("spectralbasis.") for name in names if name.startswith("spectralbasis.")}
        found[module] = {one if one in files else one.rpartition(".")[0] for one in ours} - {module, ""}
    return found


def test_every_module_is_on_a_floor_and_none_imports_from_a_floor_above():
    above = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if FLOOR[module.partition(".")[0]] < FLOOR[other.partition(".")[0]] and (module, other) not in UPWARDS
    ]
    assert above == []


def test_no_module_imports_in_a_circle():
    downwards = {module: {o for o in others if (module, o) not in UPWARDS} for module, others in imports().items()}
    TopologicalSorter(downwards).prepare()  # raises CycleError, which names the modules


def test_the_study_is_imported_by_its_command_alone():
    users = {module for module, others in imports().items() for other in others if other.startswith("study")}
    assert {module for module in users if not module.startswith("study")} <= {"commands.training_commands"}
