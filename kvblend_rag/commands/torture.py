"""``kvblend torture``: what a store must stand. No engine is needed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kvblend_rag.commands import terminal
from kvblend_rag.errors import ConfigError

_MAX_WRITERS = 16
_SHOWN = 10


def store(*, rounds: int = 100, writers: int = 2, seed: int = 0, json: str | None = None) -> int:
    """Kill writers at random instants and damage chunks in every way, on a store of its own; 1 when one was wrong.

    Raises:
        ConfigError: numbers that can't be used.
    """
    if rounds < 1 or not 1 <= writers <= _MAX_WRITERS:
        raise ConfigError(f"Give --rounds of 1 or more, and --writers from 1 to {_MAX_WRITERS}.")
    from kvblend_rag.commands import torture_damage, torture_kill

    with tempfile.TemporaryDirectory(prefix="kvblend-torture-") as folder, Progress(console=terminal.err()) as bar:
        task = bar.add_task("kill -9", total=rounds)
        kills = torture_kill.run(Path(folder) / "kill", rounds, writers, seed, lambda: bar.advance(task))
        damage = torture_damage.run(Path(folder))
    console = terminal.prose(json)
    died = ", ".join(f"{count} at {work}" for work, count in sorted(kills["killed_during"].items()))
    console.print(
        f"{kills['rounds']} rounds, {writers} writers killed in each ({died}): {kills['acknowledged']:,} chunks "
        f"acknowledged, {kills['compared']:,} compared bit for bit, {len(kills['wrong'])} wrong."
    )
    console.print(f"Left behind and mended: {_listed(kills['mended'])}.")
    console.print(
        f"Damage and faults refused: {_listed(damage['refused'])}; of {_listed(damage['tried'])} tried, "
        f"{len(damage['wrong'])} wrong."
    )
    for line in damage["left_out"]:
        console.print(f"Left out: {line}.")
    wrong = kills["wrong"] + damage["wrong"]
    for line in wrong[:_SHOWN]:
        terminal.complain(line)
    terminal.write_json({"kills": kills, "damage": damage}, json)
    return 1 if wrong else 0


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing"


__all__ = ["store"]
