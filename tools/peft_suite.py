"""PEFT's own tests with SPECTRAL in LoRA's place: `python -m tools.peft_suite [--sdist FILE] [OPTIONS OF PYTEST]`.

The tests are those of the source distribution of the installed PEFT, which pip downloads where it is not given; they
are unpacked into a temporary folder. As a plugin of pytest, this module gives them `SpectralConfig` under the name of
`LoraConfig`, and leaves out the tests that are about other methods. Models of the hub are made here, tiny and with
random weights.

It succeeds where every test passes but those of `EXCEPTIONS`, and each of these fails as it says there.
"""

import argparse
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import PeftConfig
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spectralbasis import SpectralConfig
from spectralbasis.kinds import KINDS

ROOT = Path(__file__).parents[1]
FILES = ("test_custom_models.py", "test_decoder_models.py", "test_target_parameters.py")
COMMIT = "0" * 40
_SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_EXPERTS = {**_SIZES, "num_local_experts": 4, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", _SIZES),
    "gpt2": ("gpt2", _GPT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", {**_SIZES, "head_dim": 8}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _SIZES),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", _SIZES),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", _GPT),
    "peft-internal-testing/opt-125m": ("opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _SIZES),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", {**_GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", _EXPERTS),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("llama4_text", _EXPERTS),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _SIZES),
}
"""Hub id → type and sizes of the model that stands for it."""


class Listed(NamedTuple):
    """Tests that fail as they should.

    Attributes:
        tests: regular expression of their names.
        error: regular expression of what they fail with.
        why: the reason.
    """

    tests: str
    error: str
    why: str


EXCEPTIONS = (
    Listed(
        r"Conv2dGroups",
        r"is a convolution of \d+ groups",
        "each output of a grouped convolution sees a part of the input, so its weight is not a single matrix: refused",
    ),
    Listed(r"MHA|_mha_", r"it is MultiheadAttention", "it reads its weights and calls no layer: refused"),
    Listed(
        r"combination|add_weighted_adapter_|test_multiple_active_adapters_forward",
        r"unexpected keyword argument 'combination_type'",
        "the sum of spectral adapters is exact, so there is nothing to choose",
    ),
    Listed(
        r"modules_to_save_merging_adapters",
        r"have modules_to_save, which cannot be added",
        "a sum of adapters with modules_to_save is refused, whatever the modules are",
    ),
    Listed(
        r"test_load_resized_|test_load_does_not_overwrite_|with_scalar_modules_to_save|test_loading_model_.*set_correctly",
        r"but the adapter was made on",
        "it loads an adapter on other weights than those that it was made on: refused",
    ),
    Listed(
        r"test_requires_grad_(lora|modules_to_save|follows_inference_mode_modules)|TestMultiRankAdapter"
        r"|preserves_custom_requires_grad|test_targeting_module_and_targeting_param_equivalent",
        r"lora_A",
        "it asks for LoRA's parameters by name",
    ),
    Listed(r"TestLayerRepr", r"'lora\.", "it asks for the names of LoRA's classes"),
    Listed(
        r"parameters_on_same_module|parameters_forward_under_autocast|parameter_result_caching|reuses_param_wrapper"
        r"|test_rank_pattern_for_moe",
        r"assert (0|\[\])",
        "it watches, or looks for, the classes of LoRA's layers",
    ),
    Listed(r"TestDynamicDispatch", r"_register_custom_module", "LoRA's way to take layers of others"),
    Listed(
        r"rejects_duplicate_name_without_mutation\[True\]",
        r"not compatible with the `PeftMixedModel`",
        "PEFT has a fixed list of the methods that a PeftMixedModel may mix",
    ),
    Listed(
        r"test_default_target_modules_not_set",
        r"DID NOT RAISE",
        "where PEFT knows no default for a model, all linear layers are adapted",
    ),
    Listed(
        r"TargetParameters::test_(generate_with_)?mixed_adapter_batches",
        r"experts see the rows mixed",
        "refused, in other words than LoRA's",
    ),
    Listed(
        r"works_with_existing_parametrization",
        r"is no parameter: it is computed from others",
        "a parameter that torch computes from others is refused",
    ),
)

_FIELDS = {one.name for one in dataclasses.fields(SpectralConfig)}
_DROPPED = {"lora_alpha", "lora_dropout", "alpha_pattern"}
"""Arguments of LoRA that change no more than how it trains."""


def translated(lora: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `SpectralConfig` from those of `LoraConfig`.

    Raises:
        KeyError: an argument changes what LoRA is, as `use_dora`, and has no counterpart.
    """
    arguments = {name: value for name, value in lora.items() if name not in _DROPPED}
    if "r" in arguments:
        arguments["leading"] = arguments.pop("r")
    start = arguments.pop("init_lora_weights", True)
    if not isinstance(start, bool):
        raise KeyError(f"init_lora_weights={start!r}")
    unknown = sorted(name for name, value in arguments.items() if name not in _FIELDS and value)
    if unknown:
        raise KeyError(", ".join(unknown))
    if not start:
        arguments["init_weights"] = False
    return {name: value for name, value in arguments.items() if name in _FIELDS}


class SpectralAsLora(SpectralConfig):
    """A SpectralConfig that is asked for in LoRA's words; the test is skipped where there are none for it."""

    def __init__(self, **lora: Any) -> None:
        try:
            arguments = translated(lora)
        except KeyError as error:
            pytest.skip(f"LoRA's own: {error.args[0]}")
        super().__init__(**{"coefficients": _run.coefficients, **arguments})


class _Run:
    """What a run was asked for, and which exceptions it met."""

    def __init__(self) -> None:
        self.coefficients = "diagonal"
        self.met: set[Listed] = set()


_run = _Run()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--coefficients`: the kind that every adapter has; the smallest where none is named."""
    parser.addoption("--coefficients", default=_run.coefficients, choices=[name for name in KINDS if name != "sparse"])


def pytest_configure(config: pytest.Config) -> None:
    """Before PEFT's tests are imported, and with them the name that is replaced here."""
    _run.coefficients = config.getoption("--coefficients")
    peft.LoraConfig = SpectralAsLora
    absent = find_spec("diffusers") is None  # imported for tests of pipelines, which are not among ours
    if absent:
        sys.modules["diffusers"] = ModuleType("diffusers")
        sys.modules["diffusers"].__dict__["StableDiffusionPipeline"] = type("StableDiffusionPipeline", (), {})
    import_module("peft_tests.testing_common")
    # Else the first use of each model asks the hub whether it is the newest.
    import_module("peft_tests.testing_utils")._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 1))
    if absent:
        del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave LoRA's cases, translated, of every list of cases of many methods."""
    marks = metafunc.definition.own_markers
    for index, mark in enumerate(marks):
        if mark.name == "parametrize":
            values = list(_cases(mark.args[1]))
            marks[index] = pytest.mark.parametrize(mark.args[0], values, *mark.args[2:], **mark.kwargs).mark


def _cases(values: Any) -> Iterator[Any]:
    seen = set()
    for value in values:
        parts = value if isinstance(value, tuple) else (value,)
        methods = [part for part in parts if _is_config(part)]
        if not methods:
            yield value
            continue
        if not all(part is SpectralAsLora or isinstance(part, SpectralAsLora) for part in methods):
            continue
        try:
            case = tuple(translated(part) if isinstance(part, dict) else part for part in parts)
        except KeyError:
            continue
        key = repr(case[1:] if isinstance(case[0], str) else case)
        if key not in seen:
            seen.add(key)
            yield case if isinstance(value, tuple) else case[0]


def _is_config(part: Any) -> bool:
    return isinstance(part, PeftConfig) or (inspect.isclass(part) and issubclass(part, PeftConfig))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other methods."""
    left_out = [item for item in items if not _is_ours(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def _is_ours(item: Any) -> bool:
    given = getattr(item, "callspec", None)
    held = list(given.params.values()) if given else []
    if any(part is SpectralAsLora or isinstance(part, SpectralAsLora) for part in held):
        return True
    return re.search(r"\bLoraConfig\(", inspect.getsource(item.function)) is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Not all of the tests have a seed of their own, and some compare to a few roundings."""
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A listed test fails where it passes, and the other way round."""
    report: Any = yield
    listed = next((one for one in EXCEPTIONS if re.search(one.tests, item.nodeid)), None)
    if listed is not None and report.when == "call" and not report.skipped:
        _run.met.add(listed)
        if call.excinfo is None:
            report.outcome, report.longrepr = "failed", f"it passes, but is among EXCEPTIONS: {listed.why}"
        elif re.search(listed.error, str(call.excinfo.value)):
            report.outcome, report.wasxfail = "skipped", listed.why
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of all tests fails where no test met an exception."""
    whole = not session.config.option.keyword and not session.config.option.collectonly
    unmet = [one.tests for one in EXCEPTIONS if one not in _run.met] if whole else []
    if unmet:
        print(f"\nno test met these of EXCEPTIONS; take them out: {unmet}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The counts by file."""
    outcomes = ("passed", "xfailed", "skipped", "failed", "error")
    for file in FILES:
        ended = {
            outcome: [report for report in terminalreporter.stats.get(outcome, ()) if f"/{file}" in report.nodeid]
            for outcome in outcomes
        }
        terminalreporter.write_line(f"{file}: " + ", ".join(f"{len(ended[name])} {name}" for name in outcomes))


def save_models(cache: Path) -> None:
    """Every model of `MODELS`, as a cache of the hub holds them."""
    for name, (kind, sizes) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        automatic = AutoModel if kind == "bert" else AutoModelForCausalLM
        torch.manual_seed(0)
        model = automatic.from_config(AutoConfig.for_model(kind, **sizes))
        model.save_pretrained(repository / "snapshots" / COMMIT)


def download(folder: Path) -> Path:
    """The source distribution of the installed PEFT."""
    wanted = f"peft=={version('peft')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", wanted]
    subprocess.run([*pip, "--dest", str(folder)], check=True)
    (found,) = folder.glob("peft-*.tar.gz")
    return found


def unpack(sdist: Path, folder: Path) -> None:
    """PEFT's tests as the package `peft_tests` in a folder, with its settings of pytest."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    (found / "tests").rename(folder / "peft_tests")
    (found / "pyproject.toml").rename(folder / "pyproject.toml")
    (folder / "peft_tests" / "__init__.py").touch()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="peft-*.tar.gz of the installed version; pip downloads it otherwise")
    given, rest = parser.parse_known_args()
    wanted = f"peft-{version('peft')}.tar.gz"
    if given.sdist is not None and given.sdist.name != wanted:
        parser.error(f"--sdist is {given.sdist.name}, but {wanted} is installed; pass that, or leave it out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(given.sdist or download(folder), folder)
        save_models(folder / "hub")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
        tests = [f"peft_tests/{file}" for file in FILES]
        options = ["-q", "-p", "tools.peft_suite", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
        command = [sys.executable, "-m", "pytest", *options, *rest, *tests]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
