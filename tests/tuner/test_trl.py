"""trl's trainers: a new adapter is trained as one of LoRA is, and a trained one is its own reference to begin with.

To go on with an adapter, they add one named "ref" and copy into it every parameter with ".default." in its name.
"""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spectralbasis import SpectralConfig
from tests.models import tiny
from tests.tuner.test_trainer import settings

trl = pytest.importorskip("trl", reason="trl is not installed")

pytestmark = pytest.mark.usefixtures("own_precision")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = [f"w{i}" for i in range(46)]
TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=4),
    "diagonal": SpectralConfig(task_type="CAUSAL_LM", target_modules=TARGETS, leading=4),
    "core": SpectralConfig(task_type="CAUSAL_LM", target_modules=TARGETS, coefficients="core", leading=4),
    "rotation": SpectralConfig(task_type="CAUSAL_LM", target_modules=TARGETS, coefficients="rotation"),
    "band": SpectralConfig(task_type="CAUSAL_LM", target_modules=[*TARGETS, "embed_tokens"], coefficients="band"),
}
EXAMPLES = [
    {
        "prompt": f"w{i} w{i + 1}",
        "completion": f" w{i + 2} w3",
        "chosen": f" w{i + 2} w3",
        "rejected": f" w{(7 * i) % 40} w9",
        "label": i % 2 == 0,
    }
    for i in range(8)
]
GENERATED = {"max_completion_length": 6, "num_generations": 2, "beta": 0.1}
TRAINERS = {
    "SFT": (("prompt", "completion"), {"max_length": 16, "max_steps": 6, "per_device_train_batch_size": len(EXAMPLES)}),
    "DPO": (("prompt", "chosen", "rejected"), {}),
    "KTO": (("prompt", "completion", "label"), {}),
    "GRPO": (("prompt",), GENERATED),
    "RLOO": (("prompt",), GENERATED),
}
"""Name of a trainer → what it reads of an example, and what it is asked for."""


AT_THE_START = {
    "DPO": {"loss": math.log(2), "rewards/margins": 0.0},
    "KTO": {"loss": 0.5, "rewards/chosen": 0.0, "rewards/rejected": 0.0},
    "GRPO": {"kl": 0.0},
    "RLOO": {"kl": 0.0},
}
"""What each trainer measures at its first step, where policy and reference are one model."""


def slow_but(quick, names):
    """The names, all but one of them marked slow."""
    return [pytest.param(name, marks=() if name == quick else pytest.mark.slow) for name in names]


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def trained(config, tmp_path):
    """The folder of an adapter that was trained before."""
    model = get_peft_model(base(), config)
    randomize(model, seed=1)
    model.save_pretrained(tmp_path / "trained")
    return tmp_path / "trained"


def base():
    torch.manual_seed(0)
    return tiny("llama", "causal", initializer_range=0.2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)


@torch.no_grad()
def randomize(model, seed):
    draws = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))


def tokenizer():
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    named = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, **named)


def share_of_low_words(completions, **columns):
    """A reward that differs between completions."""
    return [sum(int(word[1:]) < 23 for word in text.split() if word in WORDS) / 6 for text in completions]


def trainer(name, model, folder, **options):
    columns, asked = TRAINERS[name]
    arguments = getattr(trl, f"{name}Config")(**{**settings(folder, max_steps=2, save_strategy="no"), **asked})
    if name in ("GRPO", "RLOO"):
        options["reward_funcs"] = share_of_low_words
    rows = Dataset.from_list([{column: row[column] for column in columns} for row in EXAMPLES])
    make = getattr(trl, f"{name}Trainer")
    return make(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **options)


def numbers(model, adapter="default"):
    """What an adapter trains, with the adapter's name left out."""
    found = {name: p for name, p in model.named_parameters() if f".{adapter}." in name or name.endswith(f".{adapter}")}
    assert found
    return {name.replace(f".{adapter}", ""): p.detach().clone() for name, p in found.items()}


def frozen(model):
    """The base's weights by their names in the base."""
    held = model.base_model.model.named_parameters()
    plain = {name.replace("base_layer.", ""): parameter for name, parameter in held}
    return {name: plain[name] for name, _ in base().named_parameters()}


def first(used, key):
    """The first value of a metric."""
    return next(entry[key] for entry in used.state.log_history if key in entry)


@pytest.mark.parametrize("name", slow_but("SFT", TRAINERS))
def test_a_new_adapter_is_trained_and_the_base_stays_as_it_is(name, config, tmp_path):
    used = trainer(name, base(), tmp_path, peft_config=config)
    before = numbers(used.model)
    used.train()
    moved = [not torch.equal(value, before[key]) for key, value in numbers(used.model).items()]
    assert all(moved) if config is not CONFIGS["LoRA"] else any(moved)
    if name == "SFT":
        losses = [entry["loss"] for entry in used.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
    for key, weight in base().named_parameters():
        assert torch.equal(frozen(used.model)[key], weight), key
    used.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    ids = torch.arange(4, 24).reshape(2, 10)
    torch.testing.assert_close(loaded(ids).logits, used.model.eval()(ids).logits)


@pytest.mark.parametrize("name", slow_but("DPO", AT_THE_START))
def test_the_reference_of_a_trained_adapter_is_that_adapter(name, trained, tmp_path):
    model = PeftModel.from_pretrained(base(), trained, is_trainable=True)
    start = numbers(model)
    used = trainer(name, model, tmp_path)
    assert numbers(used.model, "ref").keys() == start.keys()
    assert all(torch.equal(value, start[key]) for key, value in numbers(used.model, "ref").items())
    used.train()
    for metric, value in AT_THE_START[name].items():
        assert first(used, metric) == pytest.approx(value, abs=1e-4)  # logs may be rounded so
    assert all(torch.equal(value, start[key]) for key, value in numbers(used.model, "ref").items())
    assert not all(torch.equal(value, start[key]) for key, value in numbers(used.model).items())
