"""What the README and the handbook promise: links, examples that run, commands that exist, a build that works."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from tests.pages import LINKS, PAGES, README, ROOT, anchors, blocks

PYTHON = [page for page in PAGES if blocks(page, "python")]
NEEDS_ATARI = ("docs/engines.md", "docs/native_environments.md")


def test_the_front_page_is_short() -> None:
    assert len(README.split()) <= 1500
    reading = README.index("## PPO in reading order")
    assert len(README[:reading].splitlines()) < 150, "three screens"


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    """To files, to headings of pages; a link with a name of code to a file that defines it."""
    for text, target in [(text, target) for where, text, target in LINKS if where == page]:
        path, _, fragment = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        name = str(file.resolve().relative_to(ROOT))
        if fragment:
            assert fragment in anchors(name), f"{target}: no such heading"
        if re.fullmatch(r"`[\w.]+`", text) and file.suffix == ".py":
            last = text.strip("`").rpartition(".")[2]
            assert re.search(rf"^\s*(?:def|class) {last}\b|^{last}\b.* = ", file.read_text("utf-8"), re.M), (text, target)


def test_every_page_is_in_the_contents() -> None:
    index = PAGES["docs/index.md"]
    listed = set(re.findall(r"^(\w+)$", "\n".join(re.findall(r"^```{toctree}(.*?)^```", index, re.M | re.S)), re.M))
    assert listed == {Path(page).stem for page in PAGES if page.startswith("docs/")} - {"index"}


@pytest.mark.parametrize("page", PYTHON)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code blocks of a page, from top to bottom, as one program in an empty folder."""
    if page in NEEDS_ATARI:
        pytest.importorskip("ale_py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", plt.close)
    code = "\n".join(blocks(page, "python"))
    names = {"__name__": "__main__" if "processes" in page else "example"}
    with warnings.catch_warnings():
        exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash") or "    make " in PAGES[page]])
def test_commands_exist(page: str) -> None:
    """Targets of make, modules and their options, scripts of the zoo, extras of the package."""
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    commands += re.findall(r"^    (make .*)$", PAGES[page], re.M)
    for command in commands:
        check_command(shlex.split(command, comments=True))


def check_command(words: list[str]) -> None:
    match words:
        case []:
            pass
        case ["make", *rest]:
            makefile = (ROOT / "Makefile").read_text()
            for target in (word for word in rest if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.M), target
        case [_, "-m", "venv", _] | ["git", *_]:
            pass
        case [_, "-m", module, *rest] if module.startswith(("benchmarks", "sb3_ppo_from_scratch")):
            spec = importlib.util.find_spec(module)
            assert spec is not None, module
            for option in (word for word in rest if word.startswith("--")):
                folder = ROOT / "benchmarks"
                assert any(
                    f'"{option}"' in text or f"{option[2:]}=" in text or f'"{option[2:]}"' in text
                    for text in (path.read_text("utf-8") for path in folder.rglob("*.py"))
                ), option
        case ["scratch-zoo", script, *_]:
            from sb3_ppo_from_scratch.zoo import SCRIPTS

            assert script in SCRIPTS, script
        case [pip, "install", *rest] if pip.endswith("pip"):
            config = configparser.ConfigParser()
            config.read(ROOT / "setup.cfg")
            for extras in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                assert set(extras.split(",")) <= set(config["options.extras_require"]), extras
        case [tool, *_]:
            assert tool in ("pre-commit", "pytest", "torchrun") or shutil.which(tool), words


def test_tables_are_whole() -> None:
    """Lines with bars that follow each other are one table, with a rule below its head; a blank line would cut it in two."""
    found = [table for text in PAGES.values() for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M)]
    assert len(found) > 10
    for table in found:
        rows = table.splitlines()
        assert len(rows) > 1, rows[0]
        assert re.fullmatch(r"\|( *:?-+:? *\|)+", rows[1]), rows[0]
        assert len({row.count("|") - row.count("\\|") for row in rows}) == 1, rows[0]


def test_the_handbook_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo", reason="pip install '.[docs]'")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compute_gae" in (tmp_path / "api.html").read_text("utf-8")
    lecture = (tmp_path / "ppo_from_scratch.html").read_text("utf-8")
    assert lecture.count("<math") > 15
    assert "https://" not in "".join(re.findall(r"<(?:script|link)\b[^>]*>", lecture)), "reading it needs no network"


def test_the_errors_that_users_meet_are_raised() -> None:
    """In the words of the headings, or as classes of these names."""
    sources = [path.read_text("utf-8") for path in (ROOT / "sb3_ppo_from_scratch").rglob("*.py")]
    # messages run over lines of strings, and have their varying parts in braces
    code = re.sub(r'["\']\s*\n\s*f?["\']', "", "\n".join(sources))
    headings = re.findall(r"^## (.*)$", PAGES["docs/faq.md"], re.M)
    quoted = [quote for heading in headings for quote in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) >= 10
    for quote in quoted:
        for part in filter(None, (part.strip(" :.()") for part in quote.split("..."))):
            assert part in code or part.startswith("Using the engine"), (quote, part)
    for name in (name for heading in headings for name in re.findall(r"\w+Error\b", heading)):
        assert f"class {name}(" in code, name
