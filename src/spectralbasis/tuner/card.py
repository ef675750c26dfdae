"""The model card that PEFT writes into an adapter folder."""

from pathlib import Path

IMPORT_NOTE = """
## Loading this adapter

PEFT learns the method "SPECTRAL" from the package `spectralbasis`: import it first.

```python
import spectralbasis
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, adapter_folder)
```
"""


def note_import(card: Path) -> None:
    """Add to an existing model card, once, that the package must be imported before the adapter is loaded."""
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    if IMPORT_NOTE.strip() not in text:
        card.write_text(text.rstrip("\n") + "\n" + IMPORT_NOTE, encoding="utf-8")
