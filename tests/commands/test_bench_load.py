"""The traffic that ``kvblend bench gpu --load`` makes."""

from collections import Counter

import numpy as np
import pytest

from kvblend_rag.commands.bench_load import Traffic


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
