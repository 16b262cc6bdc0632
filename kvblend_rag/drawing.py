"""A prompt drawn, for a terminal, for a notebook, and as a plot."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by people with any colour vision, and on light and dark pages alike (Okabe and Ito, 2008).
COLOURS = {"cached": "#999999", "reused": "#009e73", "recomputed": "#e69f00", "computed": "#d55e00"}
_MEANING = {
    "cached": "in vLLM's prefix cache",
    "reused": "stored KV, as stored",
    "recomputed": "stored, computed again",
    "computed": "computed",
}
_TERMINAL_WIDTH = 64


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A prompt's tokens as a strip in the colours of their groups."""

    tokens: int
    """Length of the prompt."""
    segments: Sequence[tuple[int, int, str]]
    """``(start, stop, group)``, in order."""
    counts: Mapping[str, int]
    """Tokens by group."""
    chunks: Sequence[tuple[int, str]]
    """Position of each stored chunk, and the tier it came from; empty: none."""
    milliseconds: Mapping[str, float]
    """Time of each step."""
    reason: str | None
    """Why less was blended than could have been."""

    def rich(self) -> Any:
        """A rich renderable: a bar of the prompt, and what its colours mean."""
        from rich.console import Group
        from rich.text import Text

        bar = Text()
        for column in range(_TERMINAL_WIDTH if self.tokens else 0):
            position = column * self.tokens // _TERMINAL_WIDTH
            group = next(group for start, stop, group in self.segments if start <= position < stop)
            bar.append("█", COLOURS[group])
        lines: list[Text] = [bar]
        for group, count in self._present():
            share = count / self.tokens
            lines.append(
                Text.assemble(("■ ", COLOURS[group]), f"{count:>6,} {group:<10} {share:4.0%}  {_MEANING[group]}")
            )
        if self.chunks:
            tiers = sorted({tier for _, tier in self.chunks if tier})
            lines.append(Text(f"{len(self.chunks)} chunks" + (f" from {', '.join(tiers)}" if tiers else "")))
        if self.milliseconds:
            lines.append(Text(self._steps(), "dim"))
        if self.reason:
            lines.append(Text(self.reason, "yellow"))
        return Group(*lines)

    def html(self) -> str:
        """HTML that inherits the page's text colour."""
        total = max(self.tokens, 1)
        blocks = "".join(
            f'<span title="tokens {start:,} to {stop:,}: {group}" style="background:{COLOURS[group]};'
            f'flex:{stop - start} 0 0"></span>'
            for start, stop, group in self.segments
        )
        legend = "".join(
            f'<span style="margin-right:1.2em"><span style="color:{COLOURS[group]}">■</span> '
            f"{count:,} {group} ({count / total:.0%})</span>"
            for group, count in self._present()
        )
        notes = [html.escape(text) for text in (self._steps(), self.reason or "") if text]
        return (
            '<div style="font-family:sans-serif;font-size:13px;max-width:48em">'
            f"<div><b>{self.tokens:,} prompt tokens</b>, {len(self.chunks)} stored chunks</div>"
            f'<div style="display:flex;height:1.4em;margin:.3em 0;border-radius:3px;overflow:hidden">{blocks}</div>'
            f"<div>{legend}</div>" + "".join(f'<div style="opacity:.75">{note}</div>' for note in notes) + "</div>"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Drawn on matplotlib axes, which are returned; None makes new ones."""
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=(9, 1.4), layout="constrained")
        seen: set[str] = set()
        for start, stop, group in self.segments:
            label = "_" if group in seen else f"{group} ({self.counts[group]:,})"
            seen.add(group)
            ax.broken_barh([(start, stop - start)], (0, 1), facecolors=COLOURS[group], label=label)
        for start, _ in self.chunks:
            ax.axvline(start, color="white", linewidth=0.8)
        ax.set(xlim=(0, max(self.tokens, 1)), ylim=(0, 1), yticks=[], xlabel="prompt token")
        if seen:
            ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
        return ax

    def _present(self) -> list[tuple[str, int]]:
        return [(group, self.counts[group]) for group in COLOURS if self.counts[group]]

    def _steps(self) -> str:
        return " · ".join(f"{step} {time:.1f} ms" for step, time in self.milliseconds.items())


__all__ = ["COLOURS", "Drawing"]
