"""Companions: the chunk that is most like another one."""

import numpy as np
import pytest

from kvblend_rag.blend.companions import companions


def about(topic, seed, tokens=120, common=40):
    """Half of what every chunk says, half of what a topic does."""
    rng = np.random.default_rng(seed)
    words = np.where(rng.random(tokens) < 0.5, rng.integers(0, common, tokens), rng.integers(0, 60, tokens) + topic)
    return words.astype(np.int32)


def test_a_chunk_goes_with_one_of_its_topic():
    topics = [1000, 2000, 3000, 250_000]
    chunks = [about(topic, seed) for seed, topic in enumerate(topics * 5)]
    found = companions(chunks, len(chunks))
    assert all(at is not None and at != index for index, at in enumerate(found))
    assert [at % len(topics) for at in found] == [index % len(topics) for index in range(len(chunks))]


def test_among_others_alone():
    chunks, others = [about(1000, 1), about(2000, 2)], [about(topic, 10 + topic) for topic in (3000, 2000, 1000)]
    assert companions([*chunks, *others], 2) == [len(chunks) + 2, len(chunks) + 1]


def test_copies_and_versions_of_a_chunk_are_no_companions():
    chunk = about(1000, 1)
    version = chunk.copy()
    version[7] = 5
    assert companions([chunk, version], 1) == [None]
    assert companions([chunk, about(1000, 2), version], 1) == [1]


@pytest.mark.parametrize("among", [0, 1, 300])
def test_nothing_in_common_is_no_companion(among):
    strangers = [np.arange(1000 * n, 1000 * n + 100, dtype=np.int32) for n in range(1, among + 1)]
    assert companions([np.arange(100, dtype=np.int32), *strangers], 1) == [None]


def test_no_chunks_have_no_companions():
    assert companions([about(1000, 1)], 0) == []


def test_more_chunks_than_are_compared_at_a_time():
    chunks = [about(1000 * (1 + seed % 7), seed, tokens=64) for seed in range(2500)]
    found = companions(chunks, len(chunks))
    right = [at is not None and at % 7 == index % 7 for index, at in enumerate(found)]
    assert np.mean(right) > 0.99
