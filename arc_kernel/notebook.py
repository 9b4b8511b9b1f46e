"""The notebook's source, a jupytext percent script, becomes an .ipynb: the same bytes from the same source.

Knows cells and their metadata; knows nothing of what they compute.
"""

from __future__ import annotations

from pathlib import Path

import jupytext

from .errors import ArcKernelError, first_line
from .files import replacing


def write_notebook(source: Path, target: Path) -> None:
    """Write the percent script `source` as notebook format 4.5 without outputs to `target`.

    Raises ArcKernelError when `source` is missing, has a broken header or names no kernelspec, or `target` cannot be written.
    """
    try:
        notebook = jupytext.reads(Path(source).read_text(encoding="utf-8"), fmt="py:percent")
    except FileNotFoundError:
        raise ArcKernelError(f"{source}: no such file: give a jupytext percent script") from None
    except Exception as error:  # a broken header raises yaml's own errors, or whatever its shape leads to
        raise ArcKernelError(f"{source}: not a percent notebook: {first_line(error)}") from None
    if not {"name", "display_name"} <= set(notebook.metadata.get("kernelspec") or {}):
        raise ArcKernelError(f"{source}: no kernelspec: give name and display_name in the YAML header (papermill needs them)")
    notebook.metadata.pop("jupytext", None)  # it says which jupytext version wrote it
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # jupytext draws random ones
        cell.metadata.pop("lines_to_next_cell", None)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    try:
        with replacing(Path(target)) as file:
            file.write(jupytext.writes(notebook, fmt="ipynb"))
    except OSError as error:
        raise ArcKernelError(f"{target}: cannot be written: {error.strerror}: give another --target") from None
