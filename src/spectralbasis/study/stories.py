"""stories260K, a Llama of 260,032 parameters that writes children's stories, as transformers opens it (Karpathy, 2023).

Its weights are a file of [llama2.c](https://github.com/karpathy/llama2.c), beside which lies its vocabulary.
"""

import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectralbasis.checkpoints import open_checkpoint
from spectralbasis.errors import InputError
from spectralbasis.training.data_files import first_line

WEIGHTS, VOCABULARY = "stories260K.bin", "tok512.bin"
PARTS = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
"""Part of the name of a tensor in a file of llama2.c → in transformers."""


def read_stories(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model and its tokenizer, from the folder with `stories260K.bin` and `tok512.bin`.

    Raises:
        InputError: a file is absent, or it is not that of stories260K.
    """
    for name in (WEIGHTS, VOCABULARY):
        if not (folder / name).is_file():
            raise InputError(f"no {name} in {folder}; give the folder that holds {WEIGHTS} and {VOCABULARY}")
    try:
        return _model_of(folder / WEIGHTS), _tokenizer_of(folder / VOCABULARY)
    except (KeyError, RuntimeError, ValueError, struct.error) as error:
        raise InputError(f"the files in {folder} are not those of stories260K: {first_line(error)}") from error


def _model_of(file: Path) -> LlamaForCausalLM:
    checkpoint = open_checkpoint(file)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    names = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"} | {
        f"model.layers.{layer}.{theirs}.weight": f"layers.{layer}.{ours}.weight"
        for layer in range(5)
        for ours, theirs in PARTS.items()
    }
    tensors = {theirs: checkpoint.read(ours) for theirs, ours in names.items()}
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs: neighbours there, halves here
            tensors[name] = tensors[name].reshape(-1, 4, 2, 64).transpose(1, 2).reshape(-1, 64)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"{missing} are missing, {unexpected} unexpected")
    return model


def _tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a vocabulary of llama2.c: each piece is merged from two others, the earliest pieces first.

    Its stories follow each other with <s> between them, so that token ends a text too.
    """
    content, pieces, position = file.read_bytes(), list[str](), 4
    while position < len(content):
        _, length = struct.unpack_from("<fi", content, position)
        pieces.append(content[position + 8 : position + 8 + length].decode())
        position += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece.replace(" ", "▁"): number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in list(vocabulary)[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="<s>", pad_token="<unk>"
    )
