"""Do the answers of a small Llama change as they are trained? `python -m benchmarks.instructions --data FOLDER`.

Takes Karpathy's stories260K (`stories260K.bin` and `tok512.bin` in FOLDER), a Llama of 260,032 parameters that writes
children's stories, and questions about one sentence, whose answer is a name or a colour of that sentence. Sentences
that are scored occur in no training row. Writes benchmarks/results/instructions.json: the share of exact answers and
the mean log-likelihood of the answers' tokens before and after the training, with several methods.
"""

import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import spectralbasis as sb
from benchmarks.results import environment, parse_arguments, write
from spectralbasis.checkpoints import open_checkpoint

NAMES = ("Lily", "Tom", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
COLOURS = ("red", "blue", "green", "big", "small", "yellow", "pink", "old")
THINGS = ("ball", "car", "hat", "box", "book", "dog", "cat", "doll", "cup", "bird")
METHODS: dict[str, dict[str, Any]] = {
    "spectral, diagonal": {"coefficients": "diagonal", "leading": 64},
    "spectral, core": {"coefficients": "core", "leading": 32},
    "lora": {"method": "lora", "rank": 4},
    "full": {"method": "full"},
}
HUGGING_FACE = {
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


def main() -> None:
    arguments = parse_arguments(__doc__, data="", steps=300)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = save_model(Path(arguments.data), folder / "model")
        train, test = save_questions(folder)
        rows = [{"method": "none", "parameters": 0, **scored(base, None, test)}]
        for name, options in METHODS.items():
            rows.append({"method": name, **trained(base, train, test, folder / name, arguments.steps, options)})
        settings = {"steps": arguments.steps, "train": len(read(train)), "test": len(read(test))}
    write("instructions", {"settings": settings, "rows": rows, **environment()})


def trained(base: Path, train: Path, test: Path, output: Path, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """A model tuned to the questions, and its scores on those held out."""
    tuned = sb.tune(base, train=train, validation=test, output=output, steps=steps, progress=False, **options)
    who = (output, None) if options.get("method") == "full" else (base, output)
    return {
        "parameters": tuned.parameters.backbone,
        "seconds": tuned.seconds,
        "bytes": tuned.adapter_bytes,
        **scored(*who, test),
    }


def scored(model: Path, adapter: Path | None, test: Path) -> dict[str, Any]:
    """Scores of a model on questions, and its first answers."""
    metrics = sb.evaluate(model, adapter, test=test, kind="instructions", progress=False).metrics
    rows = read(test)
    said = [row["prediction"] for row in sb.predict(model, adapter, test, new_tokens=8)]
    right = sum(answer == row["completion"] for answer, row in zip(said, rows, strict=True))
    first = [[row["prompt"], row["completion"], answer] for row, answer in zip(rows[:4], said[:4], strict=True)]
    return {"exact": right / len(rows), **metrics, "answers": first}


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def save_questions(folder: Path, train: int = 480, test: int = 80) -> tuple[Path, Path]:
    """Files of two questions about each sentence; no sentence is in both."""
    sentences = list(product(NAMES, COLOURS, THINGS))
    Random(0).shuffle(sentences)
    files = folder / "train.jsonl", folder / "test.jsonl"
    for file, chosen in zip(files, (sentences[:train], sentences[train : train + test]), strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for sentence in chosen for row in questions(sentence)))
    return files


def questions(sentence: Sequence[str]) -> Iterator[dict[str, str]]:
    """Who has the thing, and what it is like."""
    name, colour, thing = sentence
    said = f"{name} has a {colour} {thing}."
    yield {"prompt": f"{said} Who has the {thing}?", "completion": name}
    yield {"prompt": f"{said} What is the {thing} like?", "completion": colour}


def save_model(data: Path, folder: Path) -> Path:
    """stories260K as a folder of transformers."""
    checkpoint = open_checkpoint(data / "stories260K.bin")
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    names = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"} | {
        f"model.layers.{layer}.{theirs}.weight": f"layers.{layer}.{ours}.weight"
        for layer in range(5)
        for ours, theirs in HUGGING_FACE.items()
    }
    tensors = {theirs: checkpoint.read(ours) for theirs, ours in names.items()}
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # rotary pairs: neighbours there, halves here
            tensors[name] = tensors[name].reshape(-1, 4, 2, 64).transpose(1, 2).reshape(-1, 64)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise ValueError(f"stories260K.bin does not fit: {missing}, {unexpected}")
    model.save_pretrained(folder)
    tokenizer_of(data / "tok512.bin").save_pretrained(folder)
    return folder


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
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


if __name__ == "__main__":
    main()
