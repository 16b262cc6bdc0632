"""Arms: the ways in which every question is asked, as written on a command line.

``plain``, ``reuse``, or ``SELECTOR:RATIO`` with any other of a request's blending options behind it, and
the ingest context behind ``@``: ``question:0.15``, ``question:0.15:span=64``, ``first:0.1@header``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from kvblend_rag.config import BlendConfig
from kvblend_rag.errors import ConfigError
from kvblend_rag.selectors import get_selector

PLAIN = "plain"
REUSE = "reuse"
DEFAULT = (PLAIN, REUSE, "first:0.15", "deviation:0.15", "question:0.05", "question:0.15", "question:0.3")


@dataclass(frozen=True)
class Arm:
    """One way of asking."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """The request's blending options."""
    context: str | None = None
    """Kind of ingest context; None for the configured one."""

    @property
    def plain(self) -> bool:
        """Whether this is a full prefill, the reference of all others."""
        return self.options.get("blend") is False


def parse_arm(text: str, config: BlendConfig) -> Arm:
    """The arm of a name.

    Args:
        text: as above.
        config: checks options and context.

    Raises:
        ConfigError: an unknown selector, option or context, or a value that can't be used.
    """
    head, at, context = text.partition("@")
    if at:
        config.replace(ingest_context=context)
    name, *given = head.split(":")
    if name == PLAIN and not given:
        if at:
            raise ConfigError("A full prefill uses no stored chunks: ask for `plain` without an ingest context.")
        return Arm(text, {"blend": False})
    options: dict[str, Any] = {"selector": "none" if name == REUSE else name}
    for place, each in enumerate(given):
        key, equals, value = each.partition("=")
        if not equals and place == 0:
            key, value = "ratio", each
        elif not equals:
            raise ConfigError(f"The arm {text!r} holds {each!r}: write its options as name=value.")
        options[key] = yaml.safe_load(value)
    get_selector(options["selector"])
    config.for_request(options)
    return Arm(text, options, context or None)


def parse_arms(texts: Iterable[str], config: BlendConfig) -> list[Arm]:
    """Arms in the given order, each once, the full prefill in front of all.

    Raises:
        ConfigError: as for ``parse_arm``.
    """
    names = dict.fromkeys([PLAIN, *texts])
    return [parse_arm(name, config) for name in names]


def by_context(arms: Iterable[Arm], config: BlendConfig) -> dict[str, list[Arm]]:
    """Arms that one engine can serve, by ingest context; the configured one first."""
    groups: dict[str, list[Arm]] = {config.ingest_context: []}
    for arm in arms:
        groups.setdefault(arm.context or config.ingest_context, []).append(arm)
    return groups


__all__ = ["DEFAULT", "PLAIN", "REUSE", "Arm", "by_context", "parse_arm", "parse_arms"]
