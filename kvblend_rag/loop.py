"""LoopThread: an event loop in a thread of its own, reachable from any other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for callers in other threads and loops.

    Args:
        loop: somebody else's running loop; None starts one here.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._thread: threading.Thread | None = None
        self.loop = loop or asyncio.new_event_loop()
        if loop is None:
            self._thread = threading.Thread(target=self.loop.run_forever, name="kvblend-engine", daemon=True)
            self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine from a thread without a loop; Ctrl-C cancels it."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def run_async(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for a coroutine from any loop."""
        return await asyncio.wrap_future(self._submit(work))

    async def stream(self, start: Callable[[], AsyncIterator[T]]) -> AsyncGenerator[T, None]:
        """Iterate, in the caller's loop, over what an iterator yields in ours; leaving cancels it."""
        caller = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

        def hand_over(more: bool, item: Any) -> None:
            caller.call_soon_threadsafe(arrived.put_nowait, (more, item))

        async def pump() -> None:
            try:
                async for item in start():
                    hand_over(True, item)
            except Exception as error:
                hand_over(False, error)
            else:
                hand_over(False, None)

        pumping = self._submit(pump())
        try:
            while True:
                more, item = await arrived.get()
                if more:
                    yield item
                elif item is None:
                    return
                else:
                    raise item
        finally:
            pumping.cancel()

    def stop(self) -> None:
        """End our own loop; somebody else's is left alone."""
        if self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(TimeoutError):
                self._submit(_cancel_all()).result(timeout=5)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(timeout=5)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if not self.loop.is_running() and self._thread is None:
            work.close()
            raise RuntimeError("The event loop that this engine was started in has ended.")
        return asyncio.run_coroutine_threadsafe(work, self.loop)


async def _cancel_all() -> None:
    """End every other task, so that none is destroyed while it waits."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["LoopThread"]
