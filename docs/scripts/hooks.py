"""What the site needs beside its pages: Plotly, from the installed package, so that no page asks another server."""

from pathlib import Path

import plotly
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add Plotly's script to what is copied."""
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    files.append(File.generated(config, "scripts/plotly.min.js", abs_src_path=str(script)))
    return files
