"""Quality against cost, one line a selector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblend_rag.figure import new_figure, save_figure
from kvblend_rag.quality.summary import ALL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = (
    ("nll_change", "ΔNLL of the gold answer, nats a token"),
    ("kl", "KL to the full prefill, nats"),
    ("f1_share", "F1 as a share of the full prefill's"),
)


def plot_quality(result: Mapping[str, Any], group: str = ALL) -> Figure:
    """Three panels over the share of the prompt that is computed, bars the 95 % intervals.

    Args:
        result: of ``kvblend eval``.
        group: which questions.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(13, 4.2)
    rows = result["groups"][group]["arms"]
    for axes, (name, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for line, arms in _lines(result["arms"]).items():
            points = sorted((rows[arm]["computed"][0], rows[arm][name]) for arm in arms if None not in rows[arm][name])
            if not points:
                continue
            across, values = [cost for cost, _ in points], [value for _, (value, _, _) in points]
            # A resample's quantile can lie on the other side of the estimate by a rounding.
            bars = [
                [max(value - low, 0) for _, (value, low, _) in points],
                [max(high - value, 0) for _, (value, _, high) in points],
            ]
            axes.errorbar(across, values, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1, label=line)
        axes.set_xlabel("share of the prompt's tokens computed")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(f"{result['engine']['model']}, {result['groups'][group]['questions']} questions")
    return figure


def save_plot(result: Mapping[str, Any], target: str | Path) -> None:
    """Write the plot of all questions; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    save_figure(plot_quality(result), target)


def _lines(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Arms that differ in their budget alone, by what they have in common."""
    lines: dict[str, list[str]] = {}
    for name, arm in arms.items():
        options = {key: value for key, value in arm["options"].items() if key != "ratio"}
        selector = "plain" if options.pop("blend", True) is False else str(options.pop("selector"))
        rest = "".join(f", {key} {value}" for key, value in options.items())
        behind = f" behind {arm['context']}" if arm["context"] else ""
        lines.setdefault(selector + rest + behind, []).append(name)
    return lines


__all__ = ["plot_quality", "save_plot"]
