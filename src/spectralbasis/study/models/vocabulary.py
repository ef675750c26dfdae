"""Tokenizers for models that are pretrained here, learned from a corpus."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from spectralbasis.study.tasks.masking import TEXT
from spectralbasis.study.tasks.task import load_task

SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
INPUTS = ["input_ids", "token_type_ids", "attention_mask"]
"""What the tokenizers give: BERT tells the texts of a pair apart by their types."""
SAMPLE = 20_000
"""Passages, evenly spaced over the training part, that a vocabulary is learned from."""


def train_tokenizer(corpus: str, data: Path | None, *, size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-case tokenizer of `size` tokens, learned from the training part of a masked-language task.

    Byte pairs rather than word pieces: their training gives the same vocabulary each time, and no word is unknown.

    Raises:
        InputError: the task or its data cannot be used.
    """
    train = load_task(corpus, data).train
    sample = train.select(range(0, len(train), max(1, len(train) // SAMPLE)))[TEXT]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(sample), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, model_input_names=INPUTS, **SPECIAL
    )
