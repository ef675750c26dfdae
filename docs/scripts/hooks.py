"""What the site needs beside its pages: Plotly, from the installed package, and the notebook as a page."""

import json
from pathlib import Path

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
    """A notebook's cells as Markdown."""
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    texts = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in cells]
    parts = [f"```python\n{text}\n```" if is_code else text for text, is_code in texts]
    return "\n\n".join([*parts, f"This page is the notebook `examples/{file.name}`, which the tests run."]) + "\n"
