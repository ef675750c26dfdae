"""Find the transformers class of a base with its adapter, its config, and whether the merged model opens."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from spectralbasis.checkpoints.names import harmless
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
    architecture = adapted_architecture(base, adapter)
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


class Ties(NamedTuple):
    """Parameters of a class that are one tensor.

    Attributes:
        groups: names of each such tensor.
        table: the names of the embedding table and of what is tied to it; empty where nothing is.
    """

    groups: list[list[str]]
    table: list[str]

    def tied_to(self, name: str) -> list[str]:
        """The other names of a parameter."""
        return [other for group in self.groups if name in group for other in group if other != name]


def find_ties(config: Mapping[str, Any]) -> Ties:
    """What the class of a config ties; nothing where transformers does not know it."""
    model_class = _model_class(config)
    if model_class is None:
        return Ties([], [])
    with torch.device("meta"), quiet():
        model = model_class(model_class.config_class.from_dict(dict(config)))
        model.tie_weights()
    return _ties_of(model)


def _ties_of(model: Any) -> Ties:
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    groups = [group for group in named.values() if len(group) > 1]
    try:
        table = id(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError):  # a model of images or of sound
        return Ties(groups, [])
    return Ties(groups, next((group for key, group in named.items() if key == table and len(group) > 1), []))


def check_opens(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], ours: Collection[str]
) -> tuple[str, Ties]:
    """Load names and shapes as transformers loads a checkpoint, on the meta device, which has no data.

    Args:
        config: the checkpoint's config.json.
        tensors: name → shape and dtype of all that the checkpoint holds.
        ours: those that must be used, and that nothing else stands for; others, such as a pooler that the class has
            not, may be left.

    Returns:
        Why it was not loaded, empty where it was; and what is tied in the loaded model.

    Raises:
        InputError: a parameter is missing, has another shape, is not used, or has two tensors.
    """
    model_class = _model_class(config)
    if model_class is None:
        named = ", ".join(config.get("architectures") or []) or "no class"
        unknown = (
            f"transformers {transformers.__version__} does not know the architecture ({named}), so it was not opened"
        )
        return unknown, Ties([], [])
    empty = {name: torch.empty(tuple(shape), dtype=dtype, device="meta") for name, (shape, dtype) in tensors.items()}
    try:
        model, report = _load(model_class, config, empty)
        _check_report(report, model_class.__name__, ours)
        alone, without = _load(model_class, config, {name: T for name, T in empty.items() if name not in ours})
    except InputError:
        raise
    except ImportError as error:
        return f"transformers cannot open this architecture here ({error}), so it was not opened", Ties([], [])
    except Exception as error:  # transformers raises all kinds, and each means that the user could not open it either
        raise InputError(f"transformers does not open the merged model as {model_class.__name__}: {error}") from error
    supplied = set(ours) - set(without["missing_keys"]) - {name for group in _ties_of(alone).groups for name in group}
    twice = sorted(supplied) if len(without["missing_keys"]) < len(ours) else []
    if twice:
        raise InputError(
            f"transformers loads {', '.join(twice)} of the merged model from another tensor of the base, whose name it "
            f"converts; merge the adapter with PEFT (model.merge_and_unload()) and save the model"
        )
    return "", _ties_of(model)


def _load(model_class: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Any, Mapping[str, Any]]:
    with quiet():
        loaded: tuple[Any, Mapping[str, Any]] = model_class.from_pretrained(
            None,
            config=model_class.config_class.from_dict(harmless(config)),
            state_dict=dict(tensors),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return loaded


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
                f"the merged model does not open as {name}: it {problem} {', '.join(keys[:3])}{more}; check that base "
                "and adapter belong together, and save with the adapter everything that was trained together with it"
            )


def _model_class(config: Mapping[str, Any]) -> Any:
    named = next(iter(config.get("architectures") or []), "")
    found = getattr(transformers, named, None) if named else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


@contextmanager
def quiet() -> Iterator[None]:
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


def adapted_architecture(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
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
