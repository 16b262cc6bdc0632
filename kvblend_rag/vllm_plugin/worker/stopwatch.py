"""Stopwatch: what a worker's steps and blends take, on a GPU without waiting for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WAITING = 256
"""Steps that a GPU may be behind with; more are forgotten."""

_Mark = float | torch.cuda.Event


class Stopwatch:
    """Times steps, and the blends inside them; a blend's time is no part of its step's.

    Args:
        device: a GPU's times are taken by events on the current stream, and known when it has come that far.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._blends: list[tuple[str, _Mark, _Mark]] = []
        self._waiting: deque[tuple[int, _Mark, _Mark, list[tuple[str, _Mark, _Mark]]]] = deque(maxlen=_WAITING)

    @contextmanager
    def blend(self, request_id: str) -> Iterator[None]:
        """Around one blend."""
        started = self._mark()
        yield
        self._blends.append((request_id, started, self._mark()))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around one step of this number."""
        self._blends = []
        started = self._mark()
        yield
        self._waiting.append((number, started, self._mark(), self._blends))

    def take(self) -> tuple[dict[int, float], dict[str, float]]:
        """Seconds of steps by number and of blends by request, of what is done since the last call."""
        steps: dict[int, float] = {}
        blends: dict[str, float] = {}
        while self._waiting and _is_done(self._waiting[0][2]):
            number, started, stopped, inside = self._waiting.popleft()
            times = {request_id: _seconds(first, last) for request_id, first, last in inside}
            blends.update(times)
            steps[number] = _seconds(started, stopped) - sum(times.values())
        return steps, blends

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _is_done(mark: _Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _seconds(first: _Mark, last: _Mark) -> float:
    if isinstance(first, float) or isinstance(last, float):
        assert isinstance(first, float)
        assert isinstance(last, float)
        return last - first
    return first.elapsed_time(last) / 1e3


__all__ = ["Stopwatch"]
