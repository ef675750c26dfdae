"""Models that several tests of training share."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import tiny
from tests.training.examples import WORDS


@pytest.fixture
def writer(tmp_path):
    """A Llama of two layers with a tokenizer of a few words, which ends texts with </s>."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "ask", "answer", "yes", "no", "maybe", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    tiny("llama", "causal", max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=3).save_pretrained(
        folder
    )
    fast.save_pretrained(folder)
    return folder
