"""The base model of a bank, opened in the class that the tasks were trained in, and the tokenizer beside it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from spectralbasis.coefficients.bank_file import HeadShape
from spectralbasis.errors import InputError
from spectralbasis.training.collators import fitted_tokenizer
from spectralbasis.training.folder_checks import check_size, reading
from spectralbasis.training.models import checked_folder, quiet_transformers, resolve_source

CLASSIFIES_TEXTS = "SEQ_CLS"
CLASSES = {
    CLASSIFIES_TEXTS: AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
}
"""`task_type` of an adapter → the class of its model."""


def load_base(source: str | Path, task_type: str | None, heads: dict[str, HeadShape]) -> PreTrainedModel:
    """A bank's base in float32 and in evaluation mode. Code in a checkpoint is never run.

    Args:
        source: a model folder, a hub id, or `minilm`.
        task_type: what PEFT calls the class of the model, as the adapters record it.
        heads: of the tasks; the base may lack these layers, and no others.

    Raises:
        InputError: the model cannot be read, is of another class, or lacks weights that no task brings.

    Examples:
        >>> import tempfile
        >>> from spectralbasis.training.quickstart import save_untrained
        >>> load_base(save_untrained(Path(tempfile.mkdtemp()) / "vit"), "SEQ_CLS", {})
        Traceback (most recent call last):
        spectralbasis.errors.InputError: ...vit is a vit model, which transformers does not open for SEQ_CLS; ...
    """
    auto = CLASSES.get(str(task_type))
    if auto is None:
        raise InputError(
            f"the tasks are of the task_type {task_type!r}, expected one of {', '.join(CLASSES)}; train them with "
            "that in SpectralConfig, or use CoefficientBank in Python with a model that you open"
        )
    place = resolve_source(source)
    folder = checked_folder(place)
    outputs: dict[str, Any] = {"num_labels": max(head.outputs for head in heads.values())} if heads else {}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        with reading(place, "model"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **outputs)
        if type(config) not in auto._model_mapping:
            raise InputError(
                f"{place} is a {config.model_type} model, which transformers does not open for {task_type}; give the "
                "base that the tasks were trained on"
            )
        config.architectures = []
        check_size(folder, config, auto.from_config)
        with reading(place, "model"):
            model, report = auto.from_pretrained(
                folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
            )
    mismatched = [name if isinstance(name, str) else name[0] for name in report["mismatched_keys"]]
    _check_only_heads_lack({*report["missing_keys"], *mismatched}, heads, place)
    found: PreTrainedModel = model.float().eval()
    return found


def _check_only_heads_lack(absent: Iterable[str], heads: dict[str, HeadShape], place: str) -> None:
    """Refuse a base whose absent weights would be random, since no task brings them."""
    foreign = sorted(name for name in absent if name.rpartition(".")[0] not in heads)
    if foreign:
        raise InputError(
            f"{place} has no usable {foreign[0]}, and the tasks do not bring it, so it would be random; give the base "
            "that the tasks were trained on, or train with this layer in modules_to_save"
        )


@dataclass(frozen=True)
class TextReader:
    """Turns texts, and pairs of texts, into batches of a model.

    Attributes:
        tokenizer: of the model.
        max_length: tokens at which an input is cut.
        vocabulary: how many tokens the model knows; None where its config does not say.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    vocabulary: int | None

    def __call__(self, inputs: Sequence[str | tuple[str, str]]) -> list[tuple[dict[str, list[int]], bool]]:
        """What the tokenizer makes of each input, without padding, and whether the input was cut.

        Raises:
            InputError: the tokenizer is not one of the model's.
        """
        found: list[tuple[dict[str, list[int]], bool]] = [({}, False)] * len(inputs)
        for kind in (str, tuple):
            places = [place for place, one in enumerate(inputs) if isinstance(one, kind)]
            if places:
                chosen: Any = [inputs[place] for place in places]
                for place, row in zip(places, self._rows(chosen), strict=True):
                    found[place] = row
        return found

    def _rows(self, chosen: Any) -> list[tuple[dict[str, list[int]], bool]]:
        texts = (chosen,) if isinstance(chosen[0], str) else tuple(map(list, zip(*chosen, strict=True)))
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length)
        names = list(encoded)
        rows = []
        for row in range(len(chosen)):
            tokens = {name: encoded[name][row] for name in names}
            largest = max(tokens["input_ids"], default=0)
            if self.vocabulary is not None and largest >= self.vocabulary:
                raise InputError(
                    f"the tokenizer gives a token the number {largest}, and the model has {self.vocabulary} tokens; "
                    "they belong to different models, so save them together again"
                )
            rows.append((tokens, bool(encoded.encodings and encoded.encodings[row].overflowing)))
        return rows

    def batch(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Rows padded to the longest of them."""
        return dict(self.tokenizer.pad(list(rows), return_tensors="pt"))


def load_reader(model: PreTrainedModel, source: str | Path, max_length: int | None = None) -> TextReader:
    """The tokenizer of a base that `load_base` opened.

    Args:
        model: the base; its config gets the padding token.
        source: where it came from.
        max_length: tokens at which an input is cut; None takes the most that the model reads.

    Raises:
        InputError: the tokenizer cannot be read, or `max_length` is more than the model can read.

    Examples:
        >>> import tempfile, transformers
        >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> load_reader(transformers.BertModel(config), tempfile.mkdtemp())
        Traceback (most recent call last):
        spectralbasis.errors.InputError: ... has no config.json; ...
    """
    folder = checked_folder(resolve_source(source))
    with quiet_transformers():
        tokenizer, longest = fitted_tokenizer(folder, model.config)
    if not 1 <= (max_length or longest) <= longest:
        raise InputError(f"--max-length {max_length} is not in what {source} reads, 1 to {longest} tokens; change it")
    vocabulary = getattr(model.config, "vocab_size", None)
    return TextReader(tokenizer, max_length or longest, vocabulary if isinstance(vocabulary, int) else None)


def load_served(
    source: str, task_type: str | None, heads: dict[str, HeadShape], max_length: int | None
) -> tuple[PreTrainedModel, TextReader]:
    """The base of a bank that classifies texts, and its reader, as a replica of a server opens them.

    Raises:
        InputError: see `load_base` and `load_reader`, or the tasks do not classify texts.

    Examples:
        >>> load_served("minilm", "CAUSAL_LM", {}, None)
        Traceback (most recent call last):
        spectralbasis.errors.InputError: the tasks are of the task_type 'CAUSAL_LM' with 0 heads, but only tasks ...
    """
    check_served(task_type, heads)
    model = load_base(source, task_type, heads)
    return model, load_reader(model, source, max_length)


def check_served(task_type: str | None, heads: dict[str, HeadShape]) -> None:
    """Refuse tasks that do not classify texts.

    Raises:
        InputError: see above.
    """
    if task_type != CLASSIFIES_TEXTS or not heads:
        raise InputError(
            f"the tasks are of the task_type {task_type!r} with {len(heads)} heads, but only tasks that classify texts "
            f"({CLASSIFIES_TEXTS}, with a head) are served; use CoefficientBank in Python for others"
        )
