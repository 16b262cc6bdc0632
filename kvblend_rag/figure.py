"""Figures: made and saved with matplotlib, which is optional."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvblend_rag.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("A plot needs matplotlib: pip install 'kvblend-rag[plot]'.") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, target: str | Path) -> None:
    """Write a figure; the suffix says the format.

    Raises:
        ConfigError: the file can't be written.
    """
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The plot can't be written to {target}: {error}.") from error


__all__ = ["new_figure", "save_figure"]
