"""Canonical names of matrices, whatever a file, a module, an adapter or a basis calls the weight.

Two names mean the same matrix if `matrix_name` maps them to one name (it drops prefixes of heads, trainers, language
models and wrappers), or if the conversion table of transformers does (`Conversions`). Code that looks for a matrix
under another name calls `same_names`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from spectralbasis.checkpoints.fused import is_fused

# Attributes under which task models, trainers, multimodal models and PEFT keep the model proper (`base_model_prefix` in
# transformers). Words that name a part of some model (encoder, backbone, vision_model) are left out on purpose.
HEAD_PREFIXES = frozenset(
    """
    base_model module model language_model transformer student teacher
    albert audio_spectrogram_transformer beit bert biogpt bit bros camembert canine clip convbert convnext convnextv2
    cvt data2vec_audio data2vec_text data2vec_vision deberta decision_transformer deit dinat dinov2
    dinov2_with_registers dinov3_convnext dinov3_vit distilbert efficientformer efficientnet electra ernie ernie_m esm
    flaubert fnet focalnet funnel glpn gpt_neox gpt_neox_japanese hgnetv2 hiera hubert ibert ijepa layoutlm layoutlmv2
    layoutlmv3 led levit lilt longformer luke lxmert markuplm mega mobilebert mobilenet_v1 mobilenet_v2 mobilevit
    mobilevitv2 mpnet mra nat nezha nystromformer perceiver poolformer pvt pvt_v2 realm reformer regnet rembert resnet
    roberta roberta_prelayernorm roc_bert roformer rwkv segformer sew siglip siglip2 splinter squeezebert swiftformer
    swin swinv2 tapas textnet timesformer unispeech unispeech_sat van videomae vilt visual_bert vit vivit wav2vec2
    wav2vec2_bert wav2vec2_conformer wavlm xlm_roberta yoso
    """.split()  # noqa: SIM905
)
# Components that compilers, sharding and adapters insert anywhere in a name.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
# Words that only say "the stack of layers" and tell two matrices of one layer number apart no further.
_STACKS = frozenset({"encoder", "layer", "layers", "h", "block", "blocks", "stages", "features", "resblocks"})
_EXPERTS = frozenset({"experts", "input_linear", "output_linear"})
_MOST_DIGITS = 9
_LABELS = {2: ("gate", "up"), 3: ("query", "key", "value")}
"""Names of the parts of a fused weight, by how many there are; the order is that of the rows."""


def matrix_name(tensor_name: str) -> str:
    """The stable name for a tensor or module: without `.weight`, wrappers and the prefix of a task head.

    Examples:
        >>> matrix_name("bert.encoder.layer.0.output.dense.weight")
        'encoder.layer.0.output.dense'
        >>> matrix_name("model.language_model.layers.0.mlp.up_proj.weight")
        'layers.0.mlp.up_proj'
    """
    parts = plain_name(tensor_name).split(".")
    while len(parts) > 1 and parts[0] in HEAD_PREFIXES:
        parts = parts[1:]
    return ".".join(parts)


def plain_name(tensor_name: str) -> str:
    """The name without `.weight` and wrappers, but with every prefix."""
    parts = [part for part in tensor_name.split(".") if part not in _WRAPPERS] or [tensor_name]
    if len(parts) > 1 and parts[-1] == "weight":
        return ".".join(parts[:-1])
    return ".".join(parts).removesuffix("_weight") or tensor_name


def clashing(tensors: Iterable[str]) -> set[str]:
    """The tensors in stacks of layers that two prefixes of heads share, so that a name needs its prefix to be certain.

    A model of `vit.encoder.layer.*` and `bert.encoder.layer.*` has two stacks `encoder.layer`. That only some of their
    names are equal says nothing about which of them another checkpoint's `encoder.layer` is.
    """
    prefixes: dict[str, dict[str, str]] = {}
    stacks: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        short = matrix_name(tensor)
        prefix = plain_name(tensor).removesuffix(short)
        prefixes.setdefault(short, {})[prefix] = tensor
        stacks.setdefault((prefix, stack_of(short)), []).append(tensor)
    shared = {(prefix, stack_of(short)) for short, held in prefixes.items() if len(held) > 1 for prefix in held}
    return {tensor for key in shared for tensor in stacks[key]}


def expert_name(name: str, expert: int) -> str:
    """The name of one expert's matrix in a stack of this name."""
    if "experts." in name:
        return name.replace("experts.", f"experts.{expert}.", 1)
    return f"{name}.{expert}"


def layer_number(name: str) -> int:
    """The first integer component of a matrix name, -1 where there is none."""
    return next((int(part) for part in name.split(".") if _is_number(part)), -1)


def kind_of(name: str) -> str:
    """What the matrix is within its layer: no layer prefix, layer number or expert number.

    A prefix that names another stack than the encoder stays (`decoder.self_attn.q_proj`), since layer and kind would
    otherwise not tell the two apart.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if _is_number(part)), None)
    if number is None:
        return name
    stack = [part for part in parts[:number] if part not in _STACKS]
    inner = [part for i, part in enumerate(parts) if i > number and not (_is_number(part) and parts[i - 1] in _EXPERTS)]
    return ".".join(stack + inner) or ".".join(parts[:number]) or "weight"


def stack_of(name: str) -> str:
    """What comes before the first number of a name, such as `visual.blocks`; all of it where there is none."""
    number = layer_number(name)
    return name if number < 0 else f".{name}.".partition(f".{number}.")[0].strip(".")


def numberless(name: str) -> str:
    """The name with `*` for every number, which all layers and experts share."""
    return ".".join("*" if _is_number(part) else part for part in name.split("."))


def _is_number(part: str) -> bool:
    """Whether a component counts layers or experts; longer digits are a hash or a date, and no table holds them."""
    return part.isascii() and part.isdigit() and len(part) <= _MOST_DIGITS


class Conversions:
    """How transformers turns the stored names of one architecture into those of its modules, as a table of its own.

    Release 5 has renamings, and converters, which put several stored tensors into one parameter (experts into a stack,
    gate and up into one weight) or divide one; release 4 has a mapping of regular expressions on each class.
    """

    def __init__(self, renamings: Sequence[Callable[[str], str]], converters: Sequence[Any] = ()) -> None:
        self._renamings = renamings
        self._converters = converters

    def canonical(self, name: str) -> str | None:
        """The canonical name of a stored tensor, of a module's parameter or of a matrix; the same for the same matrix.

        None where the two sides hold the weight in different arrangements (rows in another order), so that equal names
        would not mean equal matrices. A canonical name is its own canonical name.
        """
        stem, _, label = name.removesuffix(".weight").rpartition(".")
        if any(label in labels for labels in _LABELS.values()):
            targets = self.divided(stem)
            if targets and label in _LABELS.get(len(targets), ()):
                return targets[_LABELS[len(targets)].index(label)]
            if is_fused(stem):
                whole = self.canonical(stem)
                return whole and f"{whole}.{label}"
        stored = _stored(name)
        renamed, converter, source = self._convert(stored)
        if converter is None:
            return self._of_stack(name) if renamed == stored else matrix_name(renamed)
        target = matrix_name(renamed)
        match [type(operation).__name__ for operation in converter.operations]:
            case ["MergeModulelist"]:
                return _of_expert(stored, renamed, target)
            case ["MergeModulelist", "Concatenate"]:
                return _part(_of_expert(stored, renamed, target), converter.source_patterns, source)
            case ["Concatenate"] if len(converter.source_patterns) > 1 and converter.operations[0].dim == 0:
                return _part(target, converter.source_patterns, source)
            case ["Transpose"] if "experts" in target.split("."):
                return target  # the shapes of a stack tell which way it is stored
        return None

    def parameter(self, name: str) -> str | None:
        """What the installed release calls the parameter of this stored name; None where it is put together."""
        renamed, converter, _ = self._convert(name)
        return renamed if converter is None else None

    def _of_stack(self, name: str) -> str:
        """The name of a matrix in a stack of experts, whose own name may be another: `input_linear.3.gate`."""
        parts = matrix_name(name).split(".")
        last = max((i for i, part in enumerate(parts) if _is_number(part)), default=0)
        stored = _stored(".".join(parts[:last]))
        renamed, converter, _ = self._convert(stored)
        if not last or converter is not None or renamed == stored:
            return matrix_name(name)
        return ".".join([expert_name(matrix_name(renamed), int(parts[last])), *parts[last + 1 :]])

    def divided(self, name: str) -> list[str]:
        """The canonical names of the equal parts into which transformers divides the rows of a stored tensor, if so."""
        renamed, converter, _ = self._convert(_stored(name))
        if converter is None or [type(operation).__name__ for operation in converter.operations] != ["Chunk"]:
            return []
        first, *_ = targets = converter.target_patterns
        if converter.operations[0].dim != 0 or first not in renamed:
            return []
        return [matrix_name(renamed.replace(first, target)) for target in targets]

    def _convert(self, stored: str) -> tuple[str, Any, str | None]:
        """The parameter's name, and the converter and its pattern that apply, if any."""
        for rename in self._renamings:
            stored = rename(stored)
        for converter in self._converters:
            renamed, source = converter.rename_source_key(stored)
            if source is not None:
                return renamed, converter, source
        return stored, None, None


def _stored(name: str) -> str:
    """A matrix name as a file would have it, since the table's patterns may end with `.weight`."""
    return name if name.endswith(("weight", "bias")) else f"{name}.weight"


def _of_expert(stored: str, renamed: str, target: str) -> str | None:
    """The target's name with the number that only the stored name has."""
    numbers, left = (Counter(part for part in name.split(".") if _is_number(part)) for name in (stored, renamed))
    lost = list((numbers - left).elements())
    return expert_name(target, int(lost[0])) if len(lost) == 1 else None


def part_number(label: str) -> int:
    """Which part of a fused weight a label names, from 0; -1 where it names none."""
    return next((labels.index(label) for labels in _LABELS.values() if label in labels), -1)


def _part(target: str | None, sources: Sequence[str], source: str | None) -> str | None:
    """The name of the part of a fused weight that one of the stored tensors is."""
    labels = _LABELS.get(len(sources))
    if not target or not labels or source is None:
        return None
    return f"{target}.{labels[list(sources).index(source)]}"


def same_names(
    ours: Collection[str],
    theirs: Collection[str],
    conversions: Callable[[], tuple[Conversions | None, Conversions | None]] = lambda: (None, None),
) -> dict[str, str]:
    """Our name → their name of the same matrix (or tensor); what has no certain partner is left out.

    Args:
        ours: names of one side.
        theirs: names of the other side.
        conversions: the tables of both sides; called where names are left over on both.
    """
    known = set(theirs)
    found = {name: name for name in ours if name in known}
    for by_table in (False, True):
        taken = set(found.values())
        left, right = [name for name in ours if name not in found], [name for name in theirs if name not in taken]
        if left and right:
            tables = conversions() if by_table else (None, None)
            our_name, their_name = (matrix_name if table is None else table.canonical for table in tables)
            partners = unambiguous({name: their_name(name) for name in right})
            canonical = unambiguous({name: our_name(name) for name in left})
            found |= {name: partners[shared] for shared, name in canonical.items() if shared in partners}
    return found


def unambiguous(canonical: Mapping[str, str | None]) -> dict[str, str]:
    """From names with their canonical names to canonical names with the one name that each has, if it has one."""
    count = Counter(canonical.values())
    return {key: name for name, key in canonical.items() if key is not None and count[key] == 1}


def conversions_of(source: Mapping[str, Any] | nn.Module | None) -> Conversions | None:
    """The table of an architecture; None where transformers does not know the architecture, or renames nothing of it.

    Args:
        source: a `config.json`, or a model of transformers. A config's model is built without weights, on the meta
            device, for the table depends on its parts; code that comes with a checkpoint is never run.
    """
    if isinstance(source, nn.Module):
        return _of_module(source)
    if not source or not isinstance(source.get("model_type"), str):
        return None
    try:
        return _of_config(json.dumps(source, sort_keys=True, default=str))
    except (TypeError, ValueError, RecursionError):
        return None


@lru_cache(maxsize=16)
def _of_config(text: str) -> Conversions | None:
    config: dict[str, Any] = json.loads(text)
    try:
        architecture, settings = _architecture(config)
        if not hasattr(architecture, "_checkpoint_conversion_mapping"):
            return _of_module(_skeleton(architecture, settings))
        return _of_patterns(architecture._checkpoint_conversion_mapping)
    except Exception:  # an odd config may do anything to a constructor; it only means that names are not converted
        return None


def model_of(config: Mapping[str, Any] | None) -> nn.Module | None:
    """The model that a `config.json` describes, in the installed release of transformers, on the meta device.

    None where transformers does not know the architecture. No weights are made, and no code of a checkpoint is run.
    """
    if not config or not isinstance(config.get("model_type"), str):
        return None
    try:
        return _skeleton(*_architecture(config))
    except Exception:  # as in `_of_config`
        return None


def modules_of(config: Mapping[str, Any] | None) -> dict[str, type[nn.Module]]:
    """Module of the model that a `config.json` describes → its class; {} where there is no such model (`model_of`)."""
    model = model_of(config)
    return {} if model is None else {name: type(module) for name, module in model.named_modules() if name}


_COUNTED = ("layer", "block", "depth", "expert", "stage", "heads")
_MEASURED = ("size", "dim", "width", "length", "channel", "capacity", "token")
_LARGEST_COUNT = 4096
_LARGEST = {"num_labels": 1 << 20, "position": 1 << 26, "image_size": 1 << 14}
"""Part of a key → what no model has more of: a config that says so is not built."""
_LARGEST_PRODUCT = 1 << 17
_UNSAFE_KEYS = (
    "auto_map", "quantization_config", "compression_config", "implementation", "use_kernels", "kernel_config",
    "checkpoint_path", "use_pretrained_backbone",
)  # fmt: skip


def _architecture(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of transformers that a config names, and its configuration without what would load code."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    settings = CONFIG_MAPPING[config["model_type"]].from_dict(harmless(config))
    names = config.get("architectures") or []
    found = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        found = MODEL_MAPPING[type(settings)]
    return found, settings


def check_counts(config: Any) -> None:
    """Raise ValueError where a config has more layers, experts, heads or labels than any model, or less than none."""
    largest = {"layer": 0, "expert": 0}
    _check_counts(config, largest)
    if largest["layer"] * largest["expert"] > _LARGEST_PRODUCT:
        raise ValueError(f"{largest['layer']} layers of {largest['expert']} experts")


def _check_counts(config: Any, largest: dict[str, int]) -> None:
    for value in config if isinstance(config, list) else ():
        _check_counts(value, largest)
    for name, value in config.items() if isinstance(config, dict) else ():
        key = str(name)  # a label of a config in memory is a number
        limit = next((limit for word, limit in _LARGEST.items() if word in key), None)
        counted = not any(word in key for word in _MEASURED)
        if counted and any(word in key for word in _COUNTED):
            limit = _LARGEST_COUNT
        for one in value if isinstance(value, list) else [value]:
            if limit is not None and isinstance(one, int | float) and not abs(one) <= limit:
                raise ValueError(f"{key}={one}")
            if counted and limit and key.startswith(("num_", "n_")) and isinstance(one, int) and one < 0:
                raise ValueError(f"{key}={one}")
        stages = [one for one in value if isinstance(one, int)] if isinstance(value, list) else []
        if limit and key.startswith(("depth", "num_", "n_")) and sum(stages) > limit:
            raise ValueError(f"{key} of {sum(stages)} altogether")
        for word in largest:
            if counted and word in key and isinstance(value, int):
                largest[word] = max(largest[word], value)
        _check_counts(value, largest)


def harmless(config: Any) -> Any:
    """A config without keys that choose code or weights, and with counts that a model may have.

    Raises:
        ValueError: a count is beyond any model.
    """
    check_counts(config)

    def without_unsafe(part: Any) -> Any:
        if isinstance(part, list):
            return [without_unsafe(value) for value in part]
        if not isinstance(part, dict):
            return part
        safe = {key: value for key, value in part.items() if not any(word in str(key) for word in _UNSAFE_KEYS)}
        return {key: without_unsafe(value) for key, value in safe.items()}

    return without_unsafe(config)


def _skeleton(architecture: Any, settings: Any) -> nn.Module:
    import torch

    with torch.device("meta"):
        return architecture._from_config(settings, attn_implementation="eager")


def _of_module(module: nn.Module) -> Conversions | None:
    unwrapped: Any = getattr(module, "get_base_model", lambda: module)
    model = unwrapped()  # a PEFT model's names would have its prefix
    if not hasattr(model, "base_model_prefix"):
        return None
    if hasattr(type(model), "_checkpoint_conversion_mapping"):
        return _of_patterns(type(model)._checkpoint_conversion_mapping)
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return None
    table = get_model_conversion_mapping(model, add_legacy=True)
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    others = [entry for entry in table if not isinstance(entry, WeightConverter)]
    renamings = [lambda name, entry=entry: entry.rename_source_key(name)[0] for entry in others]
    return Conversions(renamings, converters) if table else None


def _of_patterns(patterns: Mapping[str, str]) -> Conversions | None:
    """Release 4: the first pattern that is found is replaced."""

    def rename(name: str) -> str:
        replaced = (re.subn(pattern, replacement, name) for pattern, replacement in patterns.items())
        return next((renamed for renamed, count in replaced if count), name)

    return Conversions([rename]) if patterns else None


def short_labels(sources: Sequence[str]) -> list[str]:
    """The shortest end of each path that tells them all apart; numbered where two are the same."""
    parts = [Path(source).parts or (source,) for source in sources]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}: {source}" for index, source in enumerate(sources)]
