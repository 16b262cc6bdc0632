"""A report drawn: for a terminal, for a notebook, and as a plot."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kvblend_rag.report import BlendReport

# Told apart by people with any colour vision, and on light and dark pages alike (Okabe and Ito, 2008).
COLOURS = {"cached": "#999999", "reused": "#009e73", "recomputed": "#e69f00", "computed": "#d55e00"}
_MEANING = {
    "cached": "in vLLM's prefix cache",
    "reused": "stored KV, as stored",
    "recomputed": "stored, computed again",
    "computed": "computed",
}
_TERMINAL_WIDTH = 64


def _counts(report: BlendReport) -> list[tuple[str, int]]:
    return [(group, getattr(report, f"{group}_tokens")) for group in COLOURS]


def _steps(report: BlendReport) -> str:
    return " · ".join(f"{step} {time:.1f} ms" for step, time in report.milliseconds.items())


def rich_report(report: BlendReport) -> Any:
    """The report as a rich renderable: a bar of the prompt, and what its colours mean."""
    from rich.console import Group
    from rich.text import Text

    bar = Text()
    segments = report.segments()
    for column in range(_TERMINAL_WIDTH if report.prompt_tokens else 0):
        position = column * report.prompt_tokens // _TERMINAL_WIDTH
        group = next(group for start, stop, group in segments if start <= position < stop)
        bar.append("█", COLOURS[group])
    lines: list[Text] = [bar]
    for group, count in _counts(report):
        if count:
            share = count / report.prompt_tokens
            lines.append(
                Text.assemble(("■ ", COLOURS[group]), f"{count:>6,} {group:<10} {share:4.0%}  {_MEANING[group]}")
            )
    if report.chunks:
        tiers = sorted({chunk.tier for chunk in report.chunks if chunk.tier})
        lines.append(Text(f"{len(report.chunks)} chunks" + (f" from {', '.join(tiers)}" if tiers else "")))
    if report.milliseconds:
        lines.append(Text(_steps(report), "dim"))
    if report.reason:
        lines.append(Text(report.reason, "yellow"))
    return Group(*lines)


def html_report(report: BlendReport) -> str:
    """The report as HTML that inherits the page's text colour."""
    total = max(report.prompt_tokens, 1)
    blocks = "".join(
        f'<span title="tokens {start:,} to {stop:,}: {group}" style="background:{COLOURS[group]};'
        f'flex:{stop - start} 0 0"></span>'
        for start, stop, group in report.segments()
    )
    legend = "".join(
        f'<span style="margin-right:1.2em"><span style="color:{COLOURS[group]}">■</span> '
        f"{count:,} {group} ({count / total:.0%})</span>"
        for group, count in _counts(report)
        if count
    )
    notes = [html.escape(text) for text in (_steps(report), report.reason or "") if text]
    return (
        '<div style="font-family:sans-serif;font-size:13px;max-width:48em">'
        f"<div><b>{report.prompt_tokens:,} prompt tokens</b>, {len(report.chunks)} stored chunks</div>"
        f'<div style="display:flex;height:1.4em;margin:.3em 0;border-radius:3px;overflow:hidden">{blocks}</div>'
        f"<div>{legend}</div>" + "".join(f'<div style="opacity:.75">{note}</div>' for note in notes) + "</div>"
    )


def plot_report(report: BlendReport, ax: Axes | None = None) -> Axes:
    """The prompt as a strip of coloured tokens; returns the axes."""
    if ax is None:
        import matplotlib.pyplot as plt

        _, ax = plt.subplots(figsize=(9, 1.4), layout="constrained")
    seen: set[str] = set()
    for start, stop, group in report.segments():
        count = getattr(report, f"{group}_tokens")
        label = "_" if group in seen else f"{group} ({count:,})"
        seen.add(group)
        ax.broken_barh([(start, stop - start)], (0, 1), facecolors=COLOURS[group], label=label)
    for chunk in report.chunks:
        ax.axvline(chunk.start, color="white", linewidth=0.8)
    ax.set(xlim=(0, max(report.prompt_tokens, 1)), ylim=(0, 1), yticks=[], xlabel="prompt token")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    return ax


__all__ = ["COLOURS", "html_report", "plot_report", "rich_report"]
