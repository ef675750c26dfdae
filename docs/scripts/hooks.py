"""What the site needs beside its pages: Plotly, from the installed package, and the notebook as a page."""

import json
import re
from pathlib import Path
from typing import Any

import plotly
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK = Path(__file__).parents[2] / "examples" / "first_look.ipynb"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add Plotly's script to what is copied, so that no page asks another server, and the notebook's page."""
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    files.append(File.generated(config, "scripts/plotly.min.js", abs_src_path=str(script)))
    files.append(File.generated(config, "first-look.md", content=notebook_page(NOTEBOOK)))
    return files


def notebook_page(file: Path) -> str:
    """A notebook's cells as Markdown, each followed by what it printed."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in cell_parts(cell)]
    return "\n\n".join([*parts, f"This page is the notebook `examples/{file.name}`, which the tests run."]) + "\n"


def cell_parts(cell: dict[str, Any]) -> list[str]:
    """The source of a cell, and what it printed or returned."""
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return [source]
    return [f"```python\n{source}\n```", *map(output_part, cell["outputs"])]


def output_part(output: dict[str, Any]) -> str:
    """Printed text, or the table of a data frame without the style that pandas gives it."""
    data = output.get("data", {})
    if "text/html" not in data:
        return f"```text\n{''.join(output.get('text') or data['text/plain']).rstrip()}\n```"
    page = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
    return page.replace(' border="1" class="dataframe"', "").replace(' style="text-align: right;"', "")
