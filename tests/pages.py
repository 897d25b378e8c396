"""The README and the handbook's pages, as tests read them."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown") + "\n"


PATHS = sorted(
    [
        *ROOT.glob("*.md"),
        *(path for path in (ROOT / "docs").glob("*.md") if not path.with_suffix(".ipynb").exists()),
        *(ROOT / "docs").glob("*.ipynb"),
    ]
)
"""The front page, other pages beside it, and the handbook's."""
PAGES = {str(path.relative_to(ROOT)): _text(path) for path in PATHS}
"""By path from the root; of a notebook the text alone."""
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
WORDS = " ".join(TEXT.split())
"""All pages, without line breaks."""
LINKS = [
    (page, text, target)
    for page, content in PAGES.items()
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", content, flags=re.M | re.S))
    if "://" not in target
]
"""Page, text and target of each link within the repository."""


def anchors(page: str) -> set[str]:
    """A page's headings as GitHub and MyST write them in links."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def blocks(page: str, language: str) -> list[str]:
    """A page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)
