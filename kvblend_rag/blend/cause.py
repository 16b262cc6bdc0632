"""Cause: the kind of a report's reason, from a bounded set, for counting."""

from __future__ import annotations

import re

_KINDS = (
    ("ingest", r"the request computes a chunk in order to store it|; nothing was stored$"),
    ("model", r"^this model can't be blended"),
    ("verdict", r"^calibration refused this model|^The verdict "),
    ("disabled", r"^blending is switched off"),
    ("asked", r"^the request asked for an ordinary prefill"),
    (
        "request",
        r"^the prompt (is given as embeddings|holds images)|^the request (uses|asks|belongs|skips)|^prompt log-prob",
    ),
    (
        "options",
        r"kv_transfer_params|^`ingest` is|blending option|^Unknown selector|cache_salt| must (be|lie) |^Unknown key",
    ),
    ("empty", r"^the store holds no chunks"),
    ("absent", r"stored chunks stands in the prompt$"),
    ("cached", r"in vLLM's own prefix cache"),
    ("slower", r"longer than computing it|would save next to nothing|^no chunk could make it faster"),
    ("unmeasured", r"^how fast chunks load from "),
    ("busy", r"hold up running answers"),
    ("spread", r"full_prefill_share"),
    ("risk", r"^the risk of "),
    ("rank", r"^another rank "),
    ("damaged", r"ingest the chunk's text again|it was not used"),
    ("missing", r"ingest its text again"),
    ("unreachable", r"did not answer within|is left alone for another|can't be reached"),
)

CAUSES = (*(name for name, _ in _KINDS), "other")
"""Every value of ``cause_of``, in the order in which they are tried."""

_PATTERNS = [(name, re.compile(pattern)) for name, pattern in _KINDS]


def cause_of(reason: str) -> str:
    """The kind of a report's reason: one of ``CAUSES``.

    A reason is written for people and names keys, paths and numbers: as a label it would make a series of its own
    each time.
    """
    return next((name for name, pattern in _PATTERNS if pattern.search(reason)), "other")


__all__ = ["CAUSES", "cause_of"]
