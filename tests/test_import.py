"""Importing the package is quick: what is large is imported when it is needed, and PEFT still knows the method."""

import subprocess
import sys

import pytest

import spectralbasis as sb

LARGE = ("torch", "transformers", "peft", "pandas", "scipy")


def python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [(), ("--version",), ("--help",), ("compare", "--help"), ("tune", "--help")])
def test_neither_the_import_nor_help_imports_what_is_large(arguments):
    program = f"""
import atexit, sys
atexit.register(lambda: print("large:", [name for name in {LARGE} if name in sys.modules]))
import spectralbasis
if sys.argv[1:]:
    from spectralbasis.cli import main
    main()
"""
    assert python(program, *arguments).splitlines()[-1] == "large: []"


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "no/such/base", "."),
        ("basis", "model.safetensors"),
        ("export", "no/such/adapter", "--to", "lora", "-o", "out"),
        ("report", "no/such/folder"),
        ("compare", "--no-such-flag"),
        ("no-such-command",),
    ],
)
def test_a_wrong_path_or_flag_is_refused_before_anything_large_is_imported(arguments, tmp_path):
    program = f"""
import atexit, os, sys
os.chdir({str(tmp_path)!r})
atexit.register(lambda: print("large:", [name for name in {LARGE} if name in sys.modules]))
from spectralbasis.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert "does not exist; pass" in done.stderr or "No such" in done.stderr
    assert done.stdout.splitlines()[-1] == "large: []"


def test_comparing_imports_what_it_needs_later_when_it_needs_it(tmp_path):
    """To the first matrix: neither what only models need, nor what only the table at the end needs."""
    program = """
import sys, spectralbasis as sb
from spectralbasis.comparison import distributing

def performed(task):
    print([name for name in ("transformers", "peft", "pandas", "scipy.optimize", "scipy.stats") if name in sys.modules])
    sys.exit()

distributing.perform_task = performed
import torch
sb.compare({"dense.weight": torch.eye(4)}, [{"dense.weight": torch.ones(4, 4)}])
"""
    assert python(program).strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import peft, spectralbasis",
        pytest.param(
            "import spectralbasis, importlib.util; importlib.util.find_spec('peft'); import peft",
            marks=pytest.mark.slow,
        ),
        pytest.param("import spectralbasis; spectralbasis.SpectralConfig; import peft", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_the_method_in_whatever_order_both_are_imported(imports):
    program = f"{imports}; import inspect; print(peft.PeftType('SPECTRAL').value, len(inspect.getsource(peft)) > 0)"
    assert python(program).split() == ["SPECTRAL", "True"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Trainer", "TrainerCallback", "AutoModelForCausalLM"])
def test_transformers_may_import_peft_while_it_is_being_imported_itself(name):
    program = f"import spectralbasis, sys; from transformers import {name}; import peft; print(peft.PeftType.SPECTRAL)"
    assert python(program).split()[-1] == "PeftType.SPECTRAL"


@pytest.mark.slow
def test_registering_imports_no_part_of_transformers_that_peft_does_not_import():
    program = "; print(*sorted(name for name in sys.modules if name.split('.')[0] == 'transformers'))"
    alone = python(f"import sys, peft{program}").splitlines()[-1]
    assert "transformers" in alone
    assert python(f"import sys, spectralbasis, peft{program}").splitlines()[-1] == alone


def test_an_adapter_is_a_checkpoint_where_the_tuner_was_not_imported(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "SPECTRAL"}')
    program = """
import sys, spectralbasis as sb
try:
    sb.open_checkpoint(sys.argv[1])
except sb.InputError as error:
    print(error)
"""
    assert "no adapter_model.safetensors" in python(program, str(tmp_path))


@pytest.mark.slow
def test_no_module_of_the_core_needs_what_is_on_unix_alone():
    program = """
import sys, filelock, pandas, peft, psutil, safetensors, scipy, torch, transformers
sys.modules |= dict.fromkeys(["fcntl", "grp", "pwd", "resource"])
import importlib, pkgutil, spectralbasis
for _, name, _ in pkgutil.walk_packages(spectralbasis.__path__, "spectralbasis."):
    if name.split(".")[1] not in ("__main__", "cli", "study", "training"):
        importlib.import_module(name)
"""
    python(program)


def test_every_public_name_is_there_and_listed():
    assert all(getattr(sb, name) is not None for name in sb.__all__)
    assert set(sb.__all__) <= set(dir(sb))
    with pytest.raises(AttributeError, match="no attribute 'subspace'"):
        _ = sb.subspace
