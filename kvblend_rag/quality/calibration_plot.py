"""A verdict's plot: what each way of blending loses and keeps, against what it recomputes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from kvblend_rag.calibration.verdict import Verdict
from kvblend_rag.quality import bootstrap
from kvblend_rag.quality.measurement import Cell, Measurement

_PANELS = (("loss", "ΔNLL of the gold answer, nats a token"), ("kl", "KL to the full prefill, nats"))


def save_plot(measured: Measurement, verdict: Verdict, target: Path) -> Path | None:
    """Draw every way of blending with its 95 % interval, the chosen one in a ring.

    Args:
        measured: what was seen; without questions nothing is drawn.
        verdict: what came of it.
        target: the file; its suffix says the format.

    Returns:
        The file; None where matplotlib is not installed.
    """
    if not measured.questions or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    lines = {
        "fixed budget": [cell for cell in measured.cells if cell.settings.get("coverage", 1.0) >= 1],
        "adaptive": [cell for cell in measured.cells if cell.settings.get("coverage", 1.0) < 1],
    }
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for line, cells in lines.items():
            points = sorted((cell.share, *_interval(cell, name)) for cell in cells)
            if points:
                shares, values, low, high = np.array(points).T
                bars = np.maximum([values - low, high - values], 0)
                axes.errorbar(shares, values, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1, label=line)
        others = [(cell.share, _interval(cell, name)[0]) for cell in measured.variations]
        if others:
            axes.plot(*np.array(others).T, "x", markersize=6, label="other spans or layers")
        for cell in (*measured.cells, *measured.variations):
            if verdict.accepted and dict(cell.settings) == verdict.settings:
                axes.plot(cell.share, _interval(cell, name)[0], "o", markersize=12, fillstyle="none", color="black")
        axes.set_xlabel("share of chunk tokens recomputed")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{verdict.model}, {verdict.context}: {verdict.status}, {measured.questions} questions")
    figure.savefig(target)
    return target


def _interval(cell: Cell, name: str) -> list[float]:
    return bootstrap.mean(np.asarray(getattr(cell, name), dtype=np.float64)).to_list()


__all__ = ["save_plot"]
