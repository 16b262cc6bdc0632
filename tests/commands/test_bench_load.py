"""The traffic that ``kvblend bench load`` makes, and who arrives while answers run."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from kvblend_rag.commands import bench_load
from kvblend_rag.commands.bench_load import BLEND, PLAIN, Traffic


@pytest.fixture
def traffic():
    chunks = [np.full(10, number, np.int32) for number in range(20)]
    return Traffic(chunks, per_prompt=4, vocabulary=1000)


def test_a_prompt_is_distinct_chunks_and_a_new_question(traffic):
    one, other = traffic.prompt(), traffic.prompt()
    assert one.dtype == np.int32
    assert len(one) == len(other) == 4 * 10 + 64
    assert len(set(one[:40].reshape(4, 10)[:, 0])) == 4
    assert all(len(set(chunk)) == 1 for chunk in one[:40].reshape(4, 10))
    assert not np.array_equal(one[40:], other[40:])
    assert one[40:].min() >= 100


def test_some_chunks_are_popular(traffic):
    drawn = Counter(int(chunk) for _ in range(300) for chunk in traffic.prompt()[:40:10])
    assert drawn[0] > drawn[5] > drawn[19] > 0


def test_arrivals_come_at_the_rate_in_random_distances(traffic):
    arrivals = traffic.arrivals(rate=5.0, seconds=200.0)
    distances = np.diff(arrivals)
    assert distances.min() > 0
    assert 1 / distances.mean() == pytest.approx(5.0, rel=0.15)
    # of a Poisson process, mean and deviation are the same
    assert distances.std() == pytest.approx(distances.mean(), rel=0.2)


class Engine:
    """Answers every prompt with a token a millisecond, and remembers how it was asked."""

    def __init__(self):
        self.asked = []
        self.kvblend = SimpleNamespace(engine=self)

    def run(self, coroutine):
        return asyncio.run(coroutine)

    async def reset_prefix_cache(self):
        self.asked.clear()

    async def stream(self, prompt, params, blend):
        if len(prompt) == 4 * 10 + 64:
            self.asked.append(blend)
        for _ in range(1000):
            await asyncio.sleep(0.001)
            yield None


@pytest.mark.parametrize("kinds", [[], [PLAIN], [BLEND], [PLAIN, BLEND]], ids=["idle", "plain", "blended", "mixed"])
def test_who_arrives_while_answers_run(traffic, kinds):
    engine = Engine()
    times = [0.01, 0.05, 0.1, 0.2, 0.25]
    gaps = bench_load._decoding(engine, traffic, times, [traffic.prompt() for _ in times], kinds, 0.3)
    assert engine.asked == (kinds * len(times))[: len(times)]
    assert gaps["prompts"] == len(engine.asked)
    assert 1.0 <= gaps["p50"] <= gaps["p95"] <= gaps["max"]
