"""Train spectral coefficients on a GLUE task, and give them to people who have only PEFT.

    python examples/lora_for_everyone.py --data path/to/glue --task RTE --output rte

Trains a diagonal of k = 64 on MiniLM, writes it as a LoRA adapter (`export_lora`: the same update, no decomposition)
and as a whole model (`export_merged`), and opens both in a new process that never imports this package.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import spectralbasis as sb

WITHOUT_US = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

logging.set_verbosity_error()
base, lora, merged = sys.argv[1:]
merged_model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
labels = merged_model.config.num_labels
start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
lora_model = PeftModel.from_pretrained(start, lora).eval()
batch = AutoTokenizer.from_pretrained(merged)(["It rains.", "Nobody came."], return_tensors="pt", padding=True)
with torch.no_grad():
    first, second = lora_model(**batch).logits, merged_model(**batch).logits
print("spectralbasis is loaded:", "spectralbasis" in sys.modules)
print("logits of LoRA and of the merged model differ by", float((first - second).abs().max()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the GLUE tasks in their original layout")
    parser.add_argument("--task", default="RTE", help="which of them")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, help="examples in each")
    parser.add_argument("--train-examples", type=int, help="use only so many")
    parser.add_argument("--output", type=Path, required=True, help="a new folder for the results")
    arguments = parser.parse_args()
    spectral, lora, merged = (arguments.output / name for name in ("spectral", "lora", "merged"))
    tuned = sb.tune(
        "minilm",
        task=arguments.task,
        data=arguments.data,
        output=spectral,
        leading=64,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        train_examples=arguments.train_examples,
    )
    print(f"{tuned.metric} {tuned.score:.3f} with {tuned.parameters.backbone:,} coefficients")
    written = sb.export_lora(spectral, lora)
    print(f"LoRA of rank {max(written.ranks.values())}, {written.parameters:,} numbers, error {written.error:.1g}")
    cut = sb.export_lora(spectral, arguments.output / "lora-8", rank=8)
    print(f"cut to rank 8: {cut.parameters:,} numbers, relative error of the update {cut.error:.2f}")
    sb.export_merged(spectral, merged)
    base = sb.SpectralConfig.from_pretrained(str(spectral)).base_model_name_or_path
    subprocess.run([sys.executable, "-c", WITHOUT_US, base, str(lora), str(merged)], check=True)


if __name__ == "__main__":
    main()
