"""Learner: computes, when the engine is idle, what prompts repeat and nobody has ingested (``learn_seen``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable

from kvblend_rag.blend.chunk import TokenIds, as_token_ids
from kvblend_rag.config import BlendConfig
from kvblend_rag.engine import Engine
from kvblend_rag.errors import KVBlendError
from kvblend_rag.kvblend import KVBlend
from kvblend_rag.serving.seen import RepeatSketch

logger = logging.getLogger(__name__)

LEARNED = "kvblend:learned"
"""The document that holds what was learned: deleting it, for a tenant, deletes all that."""

_LOOK_S = (1.0, 15.0)
"""Pauses between two looks: the shortest, and the longest after some with nothing to do. Each look wakes the workers,
and vLLM's spin for a second after it (vllm/distributed/device_communicators/shm_broadcast.py)."""

_IDLE_S = 1.0
_AT_A_TIME = 32
_WAITING = 256


class Learner:
    """Looks at the prompts that the workers have noted, and ingests one repeated run at a time.

    Args:
        engine: where the prompts are noted; it must be idle before anything is computed.
        handle: of a tenant.
        config: ``seen_times``.
    """

    def __init__(self, engine: Engine, handle: Callable[[str], KVBlend], config: BlendConfig) -> None:
        self._engine, self._handle = engine, handle
        self._sketch = RepeatSketch(config.seen_times)
        self._waiting: OrderedDict[tuple[str, bytes], TokenIds] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self.learned = 0
        """Chunks computed so far."""

    def start(self) -> None:
        """Begin, in the event loop that is running."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def look(self) -> bool:
        """Take in new prompts, and learn one run if the engine is idle; whether there was something to do."""
        noted = next((each for each in await self._engine.call("take_seen", _AT_A_TIME) if each), None)
        if noted is None:
            return False
        for prompt in noted["prompts"]:
            tokens = as_token_ids(prompt["token_ids"])
            known = [(start, stop) for start, stop in prompt["known"]]
            for start, stop in await asyncio.to_thread(self._sketch.observe, prompt["tenant"], tokens, known):
                run = tokens[start:stop].copy()
                self._waiting[prompt["tenant"], run.tobytes()] = run
        while len(self._waiting) > _WAITING:
            self._waiting.popitem(last=False)
        if noted["idle"] < _IDLE_S or not self._waiting:
            return bool(noted["prompts"])
        (tenant, _), run = self._waiting.popitem()
        report = await self._handle(tenant).aingest([run], document_ids=[LEARNED], progress=False)
        self.learned += report.computed
        if report.computed:
            logger.info("kvblend: learned %d chunks of %d tokens from prompts.", report.computed, report.tokens)
        return True

    async def _work(self) -> None:
        shortest, longest = _LOOK_S
        pause = shortest
        while True:
            try:
                did = await self.look()
            except KVBlendError as error:
                logger.warning("kvblend: nothing is learned from prompts for now: %s", error)
                did = False
            except Exception:  # a server must not lose its answers to this
                logger.exception("kvblend: learning from prompts failed.")
                did = False
            if did:
                pause = shortest
                continue
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)


__all__ = ["LEARNED", "Learner"]
