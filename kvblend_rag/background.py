"""Background: work done in order by one thread, with a bounded queue in front of it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm.auto import tqdm


class _Task(NamedTuple):
    work: Callable[[], Any]
    size: int


class Background:
    """A thread that starts with the first task and ends with ``close``.

    Args:
        capacity: size of the tasks that may wait; a further one blocks its caller until there is room.
        label: of the progress bar; None for none.
    """

    def __init__(self, capacity: int, label: str | None = None) -> None:
        self._capacity, self._label = capacity, label
        self._waiting: deque[_Task] = deque()
        self._pending = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._error: BaseException | None = None
        self._bar: Any = None

    @property
    def pending(self) -> int:
        """Size of the tasks that are not done."""
        return self._pending

    def put(self, work: Callable[[], Any], size: int = 1, urgent: bool = False) -> None:
        """Have something done.

        Args:
            work: called in the thread; what it raises is raised by ``flush``.
            size: its share of the capacity; one larger than that waits until it is alone.
            urgent: next, whatever waits and however full the queue is.
        """
        with self._changed:
            self._changed.wait_for(lambda: urgent or not self._pending or self._pending + size <= self._capacity)
            (self._waiting.appendleft if urgent else self._waiting.append)(_Task(work, size))
            self._pending += size
            self._show(more=size)
            if self._thread is None:
                self._ending = False
                self._thread = threading.Thread(target=self._run, name="kvblend-background", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until nothing is pending.

        Raises:
            BaseException: the first that a task raised since the last flush.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._pending)
            error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Flush and end the thread; a second call does nothing."""
        try:
            self.flush()
        finally:
            with self._changed:
                self._ending = True
                self._changed.notify_all()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending)
                if not self._waiting:
                    return
                task = self._waiting.popleft()
            error: BaseException | None = None
            try:
                task.work()
            except BaseException as caught:
                error = caught
            with self._changed:
                self._error = self._error or error
                self._pending -= task.size
                self._show(done=task.size)
                self._changed.notify_all()

    def _show(self, more: int = 0, done: int = 0) -> None:
        if self._label is None:
            return
        if self._bar is None:
            self._bar = tqdm(total=0, desc=self._label, unit="doc")
        self._bar.total += more
        self._bar.update(done)
        if not self._pending:
            self._bar.close()
            self._bar = None


__all__ = ["Background"]
