from __future__ import annotations

import asyncio
import itertools
import time

from llama_index.llms.kvblend import KVBlendLLM

LONG = " ".join(f"word{number}" for number in range(40))


async def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_two_coroutines_stream_at_once(kv_of) -> None:
    kv = kv_of(lambda request: LONG if "first" in request.prompt else LONG.replace("word", "other"), delay=0.005)
    llm = KVBlendLLM(kv=kv)
    order = []

    async def read(name: str) -> str:
        text = ""
        async for each in await llm.astream_complete(name):
            order.append(name)
            text += each.delta
        return text

    first, second = await asyncio.gather(read("first"), read("second"))
    assert first == LONG
    assert second == LONG.replace("word", "other")
    assert kv.engine.peak == 2
    assert sum(a != b for a, b in itertools.pairwise(order)) > 10, "one waited for the other"


async def test_a_cancelled_stream_frees_its_request(kv_of) -> None:
    kv = kv_of(LONG, delay=0.02)
    llm = KVBlendLLM(kv=kv)
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in await llm.astream_complete("tell"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: len(kv.engine.aborted) == 1)


async def test_a_stream_that_is_left_frees_its_request(kv_of) -> None:
    kv = kv_of(LONG, delay=0.02)
    stream = await KVBlendLLM(kv=kv).astream_complete("tell")
    async for _ in stream:
        break
    await stream.aclose()
    del stream
    await until(lambda: len(kv.engine.aborted) == 1)


async def test_a_cancelled_answer_frees_its_request(kv_of) -> None:
    kv = kv_of(LONG, delay=0.02)
    task = asyncio.create_task(KVBlendLLM(kv=kv).achat([]))
    await until(lambda: len(kv.engine.requests) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: len(kv.engine.aborted) == 1)


def test_a_blocking_stream_that_is_left_frees_its_request(kv_of) -> None:
    kv = kv_of(LONG, delay=0.02)
    stream = KVBlendLLM(kv=kv).stream_complete("tell")
    next(stream)
    stream.close()
    del stream
    asyncio.run(until(lambda: len(kv.engine.aborted) == 1))


async def test_many_at_once_become_one_batch(kv_of) -> None:
    kv = kv_of(LONG, delay=0.02)
    llm = KVBlendLLM(kv=kv)
    answers = await asyncio.gather(*(llm.acomplete(f"Question {number}") for number in range(32)))
    assert [answer.text for answer in answers] == [LONG] * 32
    assert kv.engine.peak == 32
