"""TTFT against prompt length: plain, a prefix hit, budgets from 5 to 20 %, and the floor of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblend_rag.commands.capacity import find_shape
from kvblend_rag.errors import ConfigError
from kvblend_rag.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR_ARM = "first 10%"


def floor_ms(result: Mapping[str, Any], rows: Mapping[str, Any], arm: str = FLOOR_ARM) -> float:
    """The longer of copying the reused KV and computing the recomputed tokens at plain's rate, in milliseconds.

    Args:
        result: of ``bench_gpu.run``.
        rows: its measurements at one prompt length.
        arm: whose tokens.
    """
    tokens = rows[arm]["tokens"]
    recomputed, reused = tokens["recomputed_tokens"], tokens["reused_tokens"]
    copied = (reused - recomputed) * find_shape(result["shape"]).bytes_per_token()
    prompt = tokens["cached_tokens"] + reused + tokens["computed_tokens"]
    compute = rows["plain"]["median_ms"] * recomputed / prompt
    return float(max(copied / result["copy_bytes_per_second"] * 1e3, compute))


def plot_sweep(result: Mapping[str, Any]) -> Figure:
    """The sweep, both axes logarithmic.

    Args:
        result: of ``bench_gpu.run`` with a sweep.

    Raises:
        ConfigError: matplotlib is not installed, or there was no sweep.
    """
    sweep = {int(length): rows for length, rows in result["sweep"].items()}
    if not sweep:
        raise ConfigError("There is nothing to plot: name prompt lengths with --sweep.")
    lengths = sorted(sweep)
    figure = new_figure(7, 4.6)
    axes = figure.subplots()
    for arm in sweep[lengths[0]]:
        rows = [sweep[length][arm] for length in lengths]
        medians = [row["median_ms"] for row in rows]
        spread = [
            [each - row["min_ms"] for each, row in zip(medians, rows, strict=True)],
            [row["max_ms"] - each for each, row in zip(medians, rows, strict=True)],
        ]
        axes.errorbar(lengths, medians, yerr=spread, marker="o", markersize=4, capsize=2, linewidth=1, label=arm)
    floors = [floor_ms(result, sweep[length]) for length in lengths]
    axes.plot(lengths, floors, linestyle=":", color="black", label=f"floor of {FLOOR_ARM}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("time to first token, ms")
    axes.set_title(
        f"{result['shape']}, random weights, {result['machine']['gpu']}, {result['engine']}", fontsize="medium"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def save_plot(result: Mapping[str, Any], target: str | Path) -> None:
    """Write the plot; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed, there was no sweep, or the file can't be written.
    """
    save_figure(plot_sweep(result), target)


__all__ = ["FLOOR_ARM", "floor_ms", "plot_sweep", "save_plot"]
