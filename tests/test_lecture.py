"""The lecture: one source for page and notebook, which was run to its end and runs again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="pip install '.[docs]'")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import make_notebook  # noqa: E402  # of docs/, which is no package

SOURCE = make_notebook.SOURCE.read_text(encoding="utf-8")
COMMITTED = json.loads(make_notebook.NOTEBOOK.read_text(encoding="utf-8"))


def code(cells: list) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def printed(cells: list) -> str:
    return "".join("".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", []))


def test_the_notebook_is_that_of_the_page() -> None:
    """``make notebook`` has been run since the page was changed: same cells, all run in order, no error, all pictures."""
    expected = make_notebook.notebook_of(SOURCE).cells
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in COMMITTED["cells"]] == [
        (cell.cell_type, cell.source) for cell in expected
    ]
    run = [cell for cell in COMMITTED["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in run] == list(range(1, len(run) + 1))
    outputs = [out for cell in run for out in cell["outputs"]]
    assert {out["output_type"] for out in outputs} <= {"stream", "display_data"}
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert sum("image/png" in out.get("data", {}) for out in outputs) == SOURCE.count("plt.show()")


def test_what_the_lecture_shows() -> None:
    """CartPole is learned, the forty lines are the package, and the language model wants what the reward says."""
    text = printed(COMMITTED["cells"])
    first, last = text.split("first 20 episodes: ")[1].split("\n")[0].split(", last 20: ")
    assert float(first) < 60
    assert float(last) > 400
    assert "largest difference of a parameter: 0.0" in text
    before = float(text.split("before, mean reward ")[1].split(":")[0])
    held, free = (float(part.split(":")[0]) for part in text.split("mean reward ")[2:4])
    assert before < 0 < held < 2.2 < free


def test_the_lecture_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, with a small budget; its own assertions hold."""
    pytest.importorskip("ale_py")
    monkeypatch.setenv("LECTURE_BUDGET", "0.02")
    notebook = make_notebook.run(make_notebook.notebook_of(SOURCE))
    assert "largest difference of a parameter: 0.0" in printed(notebook.cells)
