"""The README of an adapter folder: what it was trained on, how it scored and how to load it."""

import json
import shlex
from pathlib import Path

from spectralbasis.printable import in_code, in_markdown, printable
from spectralbasis.study.models.loading import LoadedModel, auto_model_of
from spectralbasis.study.training.results import TuneResult

CARD = """\
---
library_name: peft
tags:
- spectralbasis
- {method_tag}
---
# {task_text} adapter ({title})

An adapter for {model_code}, trained on {task_text} with spectralbasis {version}.

| | |
| --- | --- |
| {metric_text} on {split} | {score:.4f} |
| trained parameters in the backbone | {backbone:,} ({share_backbone:.4%} of the model) |
| trained parameters in the head | {head:,} ({share_head:.4%} of the model) |
| size of the weights | {size:,} bytes |
| steps, batch size, seed | {steps}, {batch_size}, {seed} |

All settings and scores are in `tuning.json`.

## Use

```
spectralbasis evaluate {model_word} path/to/this/folder --task {task_word} --data DIR
```

```python
import spectralbasis  # registers the method with PEFT
from peft import PeftModel
from {module} import {auto_model}

base = {auto_model}.from_pretrained({place}{arguments})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""


def write_card(folder: Path, result: TuneResult, loaded: LoadedModel) -> None:
    """Write `README.md` for the adapter in `folder`, in place of PEFT's template."""
    labels = f", num_labels={loaded.task.num_labels}, ignore_mismatched_sizes=True"
    auto_model = auto_model_of(loaded.task)
    module = auto_model.__module__ if auto_model.__module__.startswith("spectralbasis") else "transformers"
    card = CARD.format(
        **{**result.settings, **vars(result)},
        title=in_markdown(f"{result.method}, {result.coefficients}" if result.coefficients else result.method),
        task_text=in_markdown(result.task),
        metric_text=in_markdown(result.metric),
        model_code=in_code(result.model),
        method_tag=json.dumps(result.method),
        model_word=shlex.quote(printable(result.model)),
        task_word=shlex.quote(printable(result.task)),
        version=result.versions["spectralbasis"],
        split=in_markdown(result.evaluation_split),
        backbone=result.parameters.backbone,
        head=result.parameters.head,
        share_backbone=result.parameters.share_backbone,
        share_head=result.parameters.share_head,
        size=result.adapter_bytes,
        module=module,
        auto_model=auto_model.__name__,
        place=json.dumps(loaded.model.config.name_or_path),
        arguments=labels if loaded.task.num_labels else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
