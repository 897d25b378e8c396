"""How every picture looks, and how it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "VERMILION", "save_figure", "subplots"]

BLUE, VERMILION, GREEN, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#000000", "#999999"
"""Okabe and Ito's, for all kinds of eyes."""


def subplots(
    rows: int, columns: int, size: tuple[float, float], heights: Sequence[float] | None = None
) -> tuple[Figure, np.ndarray]:
    """
    A figure without a screen.

    :param rows: of panels
    :param columns: of panels
    :param size: in inches, of 100 pixels each
    :param heights: of the rows, relative to each other
    :return: the figure, and its axes ``[rows, columns]``
    """
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(rows, columns, figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
