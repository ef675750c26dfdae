"""Which class of transformers a base and its adapter are together, what its config says, and whether it opens."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from spectralbasis.errors import InputError

_CLASSES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}
_DTYPES = ("dtype", "torch_dtype")
_OTHER_VOCABULARIES = ("vision", "audio", "image")


def merged_config(
    base: Mapping[str, Any], adapter: Mapping[str, Any], added: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """The config.json of a base with an adapter merged into it.

    Args:
        base: the base's config.json; empty where there is none, and then so is the result.
        adapter: adapter_config.json.
        added: parameter → shape of what the adapter brings, such as a head.
    """
    if not base:
        return {}
    config = {name: value for name, value in base.items() if name != "_name_or_path"}
    architecture = _architecture(base, adapter)
    if architecture:
        config["architectures"] = [architecture]
    labels = _labels(added)
    if labels and architecture.endswith("Classification") and len(base.get("id2label") or {}) != labels:
        named = {str(number): f"LABEL_{number}" for number in range(labels)}
        config |= {"id2label": named, "label2id": {label: int(number) for number, label in named.items()}}
    return config


def with_vocabulary(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The config with `new` tokens wherever it says `old`, in the config of its language model too."""
    changed: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and not name.startswith(_OTHER_VOCABULARIES):
            changed[name] = with_vocabulary(value, old, new)
        else:
            changed[name] = new if name == "vocab_size" and value == old else value
    return changed


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with the dtype of the weights, wherever it names one."""
    name = str(dtype).removeprefix("torch.")
    changed = {key: _with_named_dtype(value, name) for key, value in config.items()}
    said = [key for key in _DTYPES if key in config] or ["torch_dtype"]
    return changed | dict.fromkeys(said, name)


def _with_named_dtype(value: Any, dtype: str) -> Any:
    """A part of a config with another dtype where it names one."""
    if not isinstance(value, Mapping):
        return value
    return {key: dtype if key in _DTYPES else _with_named_dtype(inner, dtype) for key, inner in value.items()}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head is a tensor of its own."""
    changed = {
        key: untied(value) if isinstance(value, Mapping) and "tie_word_embeddings" in value else value
        for key, value in config.items()
    }
    return changed | {"tie_word_embeddings": False}


def output_head(config: Mapping[str, Any]) -> str | None:
    """Name of the weight of the head over the vocabulary; None where the class has none or is unknown."""
    model_class = _model_class(config)
    if model_class is None:
        return None
    with torch.device("meta"), _quiet():
        model = model_class(model_class.config_class.from_dict(dict(config)))
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def check_opens(folder: Path, config: Mapping[str, Any], ours: Collection[str]) -> str:
    """Open a checkpoint with transformers on the meta device, which takes names and shapes and keeps no data.

    Args:
        folder: the checkpoint.
        config: its config.json.
        ours: tensors that must be used; others, such as a pooler that the class has not, may be left.

    Returns:
        Why it was not opened; empty where it was.

    Raises:
        InputError: a parameter is missing, has another shape, or is not used.
    """
    model_class = _model_class(config)
    if model_class is None:
        named = ", ".join(config.get("architectures") or []) or "no class"
        return f"transformers {transformers.__version__} does not know the architecture ({named}), so it was not opened"
    try:
        with _quiet():
            _, report = model_class.from_pretrained(
                folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
            )
    except ImportError as error:
        return f"transformers cannot open this architecture here ({error}), so it was not opened"
    except Exception as error:  # transformers raises all kinds, and each means that the user could not open it either
        raise InputError(f"transformers does not open the merged model as {model_class.__name__}: {error}") from error
    _check_report(report, model_class.__name__, ours)
    return ""


def _check_report(report: Mapping[str, Any], name: str, ours: Collection[str]) -> None:
    mismatched = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys") or ()]
    problems = {
        "lacks": sorted(report.get("missing_keys") or ()),
        "has in another shape": sorted(mismatched),
        "does not use": sorted(set(report.get("unexpected_keys") or ()) & set(ours)),
    }
    for problem, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise InputError(
                f"the merged model does not open as {name}, which {problem} {', '.join(keys[:3])}{more}; "
                f"check that base and adapter belong together, and save with the adapter what was trained beside it"
            )


def _model_class(config: Mapping[str, Any]) -> Any:
    named = next(iter(config.get("architectures") or []), "")
    found = getattr(transformers, named, None) if named else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No messages and no bars of transformers: what they say is checked."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _architecture(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    """The class that the adapter was trained in; the base's own where its config does not tell."""
    named = (adapter.get("auto_mapping") or {}).get("base_model_class")
    if isinstance(named, str):
        return named
    of_task = _CLASSES.get(str(adapter.get("task_type")), {}).get(base.get("model_type"))
    if isinstance(of_task, tuple):
        return str(of_task[0])
    return str(of_task or next(iter(base.get("architectures") or []), ""))


def _labels(added: Mapping[str, Sequence[int]]) -> int:
    """How many labels a head has: a linear layer never widens towards them. 0 where there is no head."""
    return min((shape[0] for name, shape in added.items() if name.endswith(".weight") and len(shape) == 2), default=0)
