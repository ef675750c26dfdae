"""Which class of transformers a base and its adapter are together, and what its config says."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.models.auto import modeling_auto

_CLASSES = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "FEATURE_EXTRACTION": modeling_auto.MODEL_MAPPING_NAMES,
}


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
