"""``kvblend torture``: what a store must stand (no engine is needed), and an engine."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress

from kvblend_rag.commands import terminal
from kvblend_rag.commands.machine import machine
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

    before = machine()
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
    return _told({"kills": kills, "damage": damage, "wrong": wrong}, before, json)


def load(*, clients: int = 500, minutes: float = 10.0, seed: int = 0, json: str | None = None) -> int:
    """Streaming clients of a server at once, some of whom leave, on a cache too small; 1 when an answer was wrong.

    Raises:
        ConfigError: numbers that can't be used.
        EngineUnavailable: the server did not start, or has ended.
    """
    if clients < 1 or minutes <= 0:
        raise ConfigError("Give --clients of 1 or more, and --minutes above 0.")
    from kvblend_rag.commands import torture_load

    before = machine()
    with tempfile.TemporaryDirectory(prefix="kvblend-torture-") as folder:
        result = torture_load.run(
            Path(folder), clients=clients, minutes=minutes, seed=seed, show=lambda text: terminal.err().print(text)
        )
    grown = [f"{name} {growth:+.1%}" for name, growth in result["memory_growth"].items()]
    terminal.prose(json).print(
        f"{clients} clients, {minutes:g} minutes, {result['preemptions']:,} preemptions, "
        f"{_listed(result['requests'])}; memory in the second half: {', '.join(grown)}."
    )
    return _told(result, before, json)


def orders(
    *, orders: int = 1000, chunks: int = 1000, per_prompt: int = 14, seed: int = 0, json: str | None = None
) -> int:
    """Chunks in ever new orders, on a store that holds a fifth of them; 1 when a figure is not reached.

    Raises:
        ConfigError: numbers that can't be used.
    """
    if orders < 2 or not 1 <= per_prompt <= chunks // 5:
        raise ConfigError("Give --orders of 2 or more, and --per-prompt from 1 to a fifth of --chunks.")
    from kvblend_rag.commands import torture_orders

    before = machine()
    with tempfile.TemporaryDirectory(prefix="kvblend-torture-") as folder:
        result = torture_orders.run(Path(folder), orders=orders, chunks=chunks, per_prompt=per_prompt, seed=seed)
    terminal.prose(json).print(
        f"{orders:,} orders of {per_prompt} chunks out of {chunks:,}: {result['reused_share']:.2%} of the resident "
        f"chunks' tokens reused, first token {result['speedup_first']['median']:.2f} times sooner at first and "
        f"{result['speedup_last']['median']:.2f} times at last."
    )
    return _told(result, before, json)


def _told(result: dict[str, Any], before: dict[str, Any], json: str | None) -> int:
    for line in result["wrong"][:_SHOWN]:
        terminal.complain(line)
    command = shlex.join(["kvblend", *sys.argv[1:]])
    terminal.write_json({"command": command, "machine": before, **result}, json)
    return 1 if result["wrong"] else 0


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items()) or "nothing"


__all__ = ["load", "orders", "store"]
