"""Train spectral coefficients with transformers' Trainer, from the data to a saved adapter.

    python examples/train_with_trainer.py --output adapter

The data are small sentences with the label "positive" or "negative". The test sentences use adjectives that no
training sentence uses. The model is MiniLM from the extra `minilm`, so nothing is downloaded. To use your own data,
replace `load_data` by `datasets.load_dataset("csv", ...)` with the columns `text` and `label`.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

import spectralbasis as sb
from spectralbasis.training import resolve_source

NOUNS = ("film", "hotel", "meal", "service", "book", "concert", "room", "teacher")
ADJECTIVES = {
    "train": (
        ("bad", "awful", "boring", "dirty", "rude", "slow", "cold", "poor"),
        ("good", "great", "exciting", "clean", "friendly", "fast", "warm", "rich"),
    ),
    "test": (("terrible", "dull", "nasty", "weak"), ("wonderful", "lovely", "pleasant", "strong")),
}


def load_data() -> DatasetDict:
    """Sentences with label 0 (negative) or 1 (positive); the splits have no adjective in common."""
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {"text": f"The {noun} was {adjective}.", "label": label}
                    for label, adjectives in enumerate(groups)
                    for adjective in adjectives
                    for noun in NOUNS
                ]
            )
            for split, groups in ADJECTIVES.items()
        }
    )


def load_base(source: str) -> PreTrainedModel:
    """The base model with a new head of two labels."""
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the rows whose largest logit is that of their label."""
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm", help="minilm, a folder that save_pretrained wrote, or a hub id")
    parser.add_argument("--epochs", type=float, default=10, help="passes over the training sentences")
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    source = resolve_source(arguments.model)

    # Data: tokenize once, pad each batch.
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = load_data().map(lambda rows: tokenizer(rows["text"]), batched=True)

    # Model: for each linear layer a band over all singular directions, together 0.2 % of the model's parameters.
    config = sb.SpectralConfig(task_type="SEQ_CLS", target_modules="all-linear")
    model = get_peft_model(load_base(source), config)
    coefficients = sum(weight.numel() for name, weight in model.named_parameters() if "spectral_" in name)
    print(f"trained: {coefficients:,} coefficients and the head")

    # Optimizer: coefficients need a higher learning rate than the head.
    groups = sb.parameter_groups(model, learning_rate=0.03, head_learning_rate=1e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(arguments.output),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=16,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        optimizers=(torch.optim.AdamW(groups), None),
    )

    # Train, evaluate, save.
    print(f"accuracy before training: {trainer.evaluate()['eval_accuracy']:.3f}")
    trainer.train()
    print(f"accuracy after training: {trainer.evaluate()['eval_accuracy']:.3f}")
    model.save_pretrained(arguments.output)
    size = (arguments.output / "adapter_model.safetensors").stat().st_size
    print(f"adapter_model.safetensors: {size / 1e3:,.0f} kB")

    # Load: the adapter on a fresh copy of the base.
    loaded = PeftModel.from_pretrained(load_base(source), arguments.output).eval()
    batch = tokenizer(["The garden was beautiful.", "The engine was broken."], return_tensors="pt", padding=True)
    with torch.no_grad():
        print("predicted labels:", loaded(**batch).logits.argmax(-1).tolist())


if __name__ == "__main__":
    main()
