"""Without the extras, the rest works, and what needs them says in a sentence what to install."""

import subprocess
import sys

import numpy as np
import pytest

import spectralbasis as sb
from spectralbasis.errors import InputError
from spectralbasis.study.conduct import study
from spectralbasis.training import Task, load_task

MASKED = ("accelerate", "datasets", "h5py", "sklearn")


@pytest.mark.parametrize("module", MASKED)
def test_every_entry_says_what_to_install(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    package = "scikit-learn" if module == "sklearn" else module
    words = rf"needs the package {package}, not installed here: pip install 'spectralbasis\[tune\]'"
    with pytest.raises(InputError, match=f"spectralbasis.tune {words}"):
        sb.tune(tmp_path, task="digits", output=tmp_path / "a")
    with pytest.raises(InputError, match=f"spectralbasis.evaluate {words}"):
        sb.evaluate(tmp_path, task="digits")
    with pytest.raises(InputError, match=f"the task digits {words}"):
        load_task("digits")
    with pytest.raises(InputError, match=f"a Task of images {words}"):
        Task.from_arrays("dark", (np.zeros((2, 8, 8)), [0, 1]), (np.zeros((2, 8, 8)), [0, 1]))
    with pytest.raises(InputError, match=r"the study needs .*: pip install 'spectralbasis\[study\]'"):
        study("all", output=tmp_path / "study")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("tune", "m", "--task", "digits", "-o", "a"), 1, "pip install 'spectralbasis[tune]'"),
        (("evaluate", "m", "--task", "digits"), 1, "pip install 'spectralbasis[tune]'"),
        (("quickstart", "-o", "q"), 1, "pip install 'spectralbasis[tune]'"),
        (("study", "all", "-o", "s"), 1, "pip install 'spectralbasis[study]'"),
        (("tune", "--help"), 0, "SST-2"),
        pytest.param(("study", "--help"), 0, "stability", marks=pytest.mark.slow),
    ],
)
def test_commands_end_in_a_sentence_and_help_works(tmp_path, arguments, code, words):
    gone = [name for name in MASKED if name != "accelerate"]  # which PEFT brings
    masks = "; ".join(f"sys.modules[{name!r}] = None" for name in gone)
    begin = f"sys.argv = ['spectralbasis', *{list(arguments)}]; from spectralbasis.cli import main; main()"
    program = f"import sys; {masks}; {begin}"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    said = done.stdout if code == 0 else done.stderr
    assert words in said
    assert "Traceback" not in said
