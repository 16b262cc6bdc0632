"""ScriptedAnswer: a text in tokens, cut where a stop text or a limit cuts it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.output import CompletionOutput


@dataclass(frozen=True, kw_only=True)
class FakeParams:
    """A ``FakeEngine``'s sampling parameters."""

    settings: Sampling = field(default_factory=Sampling)
    kind: Literal["cumulative", "delta", "final"] = "cumulative"
    """Outputs hold everything so far, what is new, or there is one at the end."""
    structured_outputs: Any = None
    """vLLM's ``StructuredOutputsParams``, where its parsers are used."""


@dataclass(frozen=True, kw_only=True)
class FakeLogprob:
    """As vLLM's ``Logprob``."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, kw_only=True)
class ScriptedAnswer:
    """Token ids with the text each adds, and why they end."""

    pieces: tuple[tuple[int, str], ...]
    finish_reason: str
    stop_reason: str | None = None
    logprob: float = -0.5
    """Of each token, in nats."""

    @classmethod
    def cut(cls, text: str, tokenizer: Any, settings: Sampling, room: int) -> ScriptedAnswer:
        """An answer as an engine would end it.

        Args:
            text: the whole of it.
            tokenizer: cuts it into tokens.
            settings: ``stop`` and ``max_tokens`` end it.
            room: tokens the context has left.
        """
        found = [(text.index(stop), stop) for stop in settings.stop if stop in text]
        stopped = min(found, default=None)
        if stopped is not None:
            text = text[: stopped[0]]
        pieces = _pieces(text, tokenizer)
        limit = min(room, settings.max_tokens or room)
        if len(pieces) > limit:
            return cls(pieces=tuple(pieces[:limit]), finish_reason="length")
        return cls(pieces=tuple(pieces), finish_reason="stop", stop_reason=stopped[1] if stopped else None)

    def output(self, index: int, step: int, params: FakeParams) -> CompletionOutput | None:
        """What is known after ``step + 1`` tokens, in the asked for kind; None when it ended before."""
        delta = params.kind == "delta"
        last = max(len(self.pieces) - 1, 0)
        if delta and step > last:
            return None
        shown = self.pieces[step : step + 1] if delta else self.pieces[: step + 1]
        done = step >= last
        wanted = params.settings.logprobs or params.settings.top_logprobs > 0
        return CompletionOutput(
            index=index,
            text="".join(text for _, text in shown),
            token_ids=tuple(token for token, _ in shown),
            logprobs=[{token: FakeLogprob(logprob=self.logprob, rank=1, decoded_token=text)} for token, text in shown]
            if wanted
            else None,
            finish_reason=self.finish_reason if done else None,
            stop_reason=self.stop_reason if done else None,
        )


def _pieces(text: str, tokenizer: Any) -> list[tuple[int, str]]:
    """The tokens of a text and what each adds to it; together they are the text to the letter."""
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    pieces, shown = [], ""
    for count, token in enumerate(ids, 1):
        so_far = str(tokenizer.decode(ids[:count]))
        # Half a character is held back until its other half is there.
        new = "" if so_far.endswith("\ufffd") or not so_far.startswith(shown) else so_far[len(shown) :]
        pieces.append((token, new))
        shown += new
    if shown == text:
        return pieces
    words = re.findall(r"\s*\S+|\s+$", text)
    return [(ids[min(place, len(ids) - 1)] if ids else 0, word) for place, word in enumerate(words)]


__all__ = ["FakeLogprob", "FakeParams", "ScriptedAnswer"]
