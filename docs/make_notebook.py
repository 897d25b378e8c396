"""
The lecture as a notebook: ``docs/ppo_from_scratch.ipynb`` from ``docs/ppo_from_scratch.md``, run from top to bottom.

``make notebook`` does it, after the Markdown file has been changed.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

SOURCE = Path(__file__).with_name("ppo_from_scratch.md")
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def notebook_of(text: str) -> nbformat.NotebookNode:
    """
    :param text: Markdown, whose blocks of Python become code cells
    :return: a notebook that has not been run
    """
    cells = []
    for index, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.MULTILINE | re.DOTALL)):
        if part.strip():
            new_cell = new_code_cell if index % 2 else new_markdown_cell
            cells.append(new_cell(part.strip(), id=f"cell-{len(cells)}"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def run(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """
    Run all cells in a fresh process, and keep what they show.

    :raises CellExecutionError: if one of them fails
    """
    NotebookClient(notebook, timeout=900, record_timing=False, kernel_name="python3").execute()
    return notebook


if __name__ == "__main__":
    nbformat.write(run(notebook_of(SOURCE.read_text(encoding="utf-8"))), NOTEBOOK)
    print(f"wrote {NOTEBOOK}")
