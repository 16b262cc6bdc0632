import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvblend_rag.blend.match import ChunkIndex, Match
from kvblend_rag.errors import ChunkRejected


def text(seed, tokens, vocabulary=50_000):
    return np.random.default_rng(seed).integers(0, vocabulary, tokens).astype(np.int32)


def filled(*chunks):
    index = ChunkIndex()
    index.add_many((f"c{number}", chunk) for number, chunk in enumerate(chunks))
    return index


def check(matches, prompt, chunks, min_run=16):
    """What holds for every result: verified, in order, without overlap, long enough."""
    stop = 0
    for match in matches:
        chunk = chunks[int(match.key[1:])]
        assert match.start >= stop
        assert match.length >= min_run
        assert match.chunk_start >= 0
        part = chunk[match.chunk_start : match.chunk_start + match.length]
        np.testing.assert_array_equal(prompt[match.start : match.stop], part)
        stop = match.stop
    assert stop <= len(prompt)


# few different tokens: repeats, near-misses and chunks within chunks come by themselves
small = st.lists(st.integers(0, 2), min_size=16, max_size=60).map(lambda tokens: np.array(tokens, np.int32))


@given(st.lists(small, min_size=1, max_size=5), st.data())
@settings(max_examples=150, deadline=None)
def test_every_match_is_verified_and_none_overlap(chunks, data):
    parts = data.draw(st.lists(st.one_of(st.sampled_from(chunks), small), max_size=8))
    prompt = np.concatenate([*parts, np.zeros(0, np.int32)]).astype(np.int32)
    min_run = data.draw(st.sampled_from([1, 16, 20]))
    matches = filled(*chunks).match(prompt, min_run)
    check(matches, prompt, chunks, min_run)
    # a whole chunk is in there, so something at least as long as the shortest one must be found
    if any(part is chunk for part in parts for chunk in chunks) and min_run <= 16:
        assert matches


@given(
    length=st.integers(16, 400),
    left=st.integers(0, 2),
    right=st.integers(0, 2),
    before=st.integers(0, 50),
    after=st.integers(0, 50),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_a_chunk_is_found_with_its_ends_tokenised_differently(length, left, right, before, after, seed):
    chunk = text(seed, length)
    if length - left - right < 16:
        return
    body = chunk.copy()
    body[:left] += 1
    body[length - right :] += 1
    prompt = np.concatenate([text(seed + 1, before), body, text(seed + 2, after)])
    found = filled(text(seed + 3, 300), chunk).match(prompt)
    check(found, prompt, [text(seed + 3, 300), chunk])
    assert [match.key for match in found] == ["c1"]
    assert found[0].chunk_start <= left
    assert found[0].length >= length - left - right


@pytest.mark.parametrize("cut", [slice(100, None), slice(None, 100), slice(60, 150)])
def test_a_part_of_a_chunk_is_found(cut):
    chunk = text(0, 256)
    prompt = np.concatenate([text(1, 30), chunk[cut], text(2, 30)])
    (found,) = filled(chunk).match(prompt)
    assert (found.start, found.chunk_start, found.length) == (30, cut.start or 0, len(chunk[cut]))


def test_a_chunk_split_by_a_line_is_found_in_both_parts():
    chunk = text(0, 256)
    prompt = np.concatenate([chunk[:120], text(1, 5), chunk[120:]])
    assert filled(chunk).match(prompt) == [Match("c0", 0, 0, 120), Match("c0", 125, 120, 136)]


def test_one_changed_token_splits_the_run():
    chunk = text(0, 256)
    prompt = chunk.copy()
    prompt[128] += 1
    assert filled(chunk).match(prompt) == [Match("c0", 0, 0, 128), Match("c0", 129, 129, 127)]


def test_a_chunk_that_stands_twice_is_found_twice():
    chunk = text(0, 64)
    prompt = np.concatenate([chunk, text(1, 9), chunk])
    assert filled(chunk).match(prompt) == [Match("c0", 0, 0, 64), Match("c0", 73, 0, 64)]


def test_chunks_that_follow_one_another_directly():
    chunks = [text(seed, 200) for seed in range(5)]
    prompt = np.concatenate([chunks[i] for i in (3, 0, 0, 4)])
    assert [(m.key, m.start, m.length) for m in filled(*chunks).match(prompt)] == [
        ("c3", 0, 200),
        ("c0", 200, 200),
        ("c0", 400, 200),
        ("c4", 600, 200),
    ]


def test_of_overlapping_chunks_the_longer_stays_whole():
    a, shared, b = text(0, 60), text(1, 40), text(2, 90)
    prompt = np.concatenate([a, shared, b])
    index = filled(np.concatenate([a, shared]), np.concatenate([shared, b]))
    assert index.match(prompt) == [Match("c0", 0, 0, 60), Match("c1", 60, 0, 130)]
    assert index.match(prompt, min_run=61) == [Match("c1", 60, 0, 130)]


def test_a_chunk_within_a_longer_one_gives_way():
    whole = text(0, 300)
    assert filled(whole[50:150], whole, whole[:100]).match(whole) == [Match("c1", 0, 0, 300)]


def test_among_many_with_the_same_opening_the_right_one_is_found():
    chunks = [np.concatenate([text(0, 64), text(seed, 100)]) for seed in range(1, 200)]
    prompt = np.concatenate([text(999, 10), chunks[150], text(998, 3), chunks[7][1:-1]])
    found = filled(*chunks).match(prompt)
    assert [(m.key, m.start, m.length) for m in found] == [("c150", 10, 164), ("c7", 177, 162)]


def test_an_opening_shared_by_all_is_found_alone():
    chunks = [np.concatenate([text(0, 64), text(seed, 100)]) for seed in range(1, 200)]
    (found,) = filled(*chunks).match(text(0, 64))
    assert (found.start, found.chunk_start, found.length) == (0, 0, 64)


@pytest.mark.parametrize("merged", [False, True])
def test_discarded_chunks_are_not_found(merged):
    chunks = [text(seed, 64) for seed in range(300)]
    index = filled(*chunks)
    # enough to have the table cleaned up, or not
    gone = range(0, 300, 2) if merged else range(0, 20, 2)
    for number in gone:
        index.discard(f"c{number}")
    assert len(index) == 300 - len(gone)
    for number, chunk in enumerate(chunks):
        assert [m.key for m in index.match(chunk)] == ([] if number in gone else [f"c{number}"])
        assert (f"c{number}" in index) == (number not in gone)
    index.add("c0", chunks[1][:40])
    assert [m.key for m in index.match(chunks[1])] == ["c1"]
    index.discard("c1")
    assert [m.key for m in index.match(chunks[1])] == ["c0"]
    index.discard("never there")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=400))
@settings(max_examples=30, deadline=None)
def test_any_history_of_adding_and_discarding(steps):
    chunks = [text(seed, 40) for seed in range(10)]
    index, there = ChunkIndex(), set()
    for adding, number in steps:
        if adding:
            index.add(f"c{number}", chunks[number])
            there.add(number)
        else:
            index.discard(f"c{number}")
            there.discard(number)
    assert len(index) == len(there)
    assert {int(m.key[1:]) for m in index.match(np.concatenate(chunks))} == there


def test_a_key_added_again_is_replaced():
    index = filled(text(0, 64))
    index.add("c0", text(1, 64))
    assert len(index) == 1
    assert index.match(text(0, 64)) == []
    assert index.match(text(1, 64)) == [Match("c0", 0, 0, 64)]


def test_the_index_keeps_its_own_copy():
    chunk = text(0, 64)
    index = filled(chunk)
    chunk[:] = 0
    assert index.match(text(0, 64)) == [Match("c0", 0, 0, 64)]


def test_too_short_a_chunk_is_rejected_and_nothing_is_added():
    index = ChunkIndex()
    with pytest.raises(ChunkRejected, match="Chunk short has 15 tokens; finding one again takes 16"):
        index.add_many([("long", text(0, 64)), ("short", text(1, 15))])
    assert len(index) == 0
    index.add("just", text(1, 16))
    assert index.match(text(1, 16)) == [Match("just", 0, 0, 16)]


@pytest.mark.parametrize("tokens", [0, 1, 15])
def test_short_prompts_and_an_empty_index(tokens):
    assert ChunkIndex().match(text(0, tokens)) == []
    assert ChunkIndex().match(text(0, 100)) == []
    assert filled(text(0, 64)).match(text(0, 64)[:tokens]) == []


def test_plain_lists_are_fine_and_other_windows_too():
    index = ChunkIndex(window=5, offset=1)
    index.add_many([])
    index.add("a", list(range(9)))
    assert index.match([77, *range(1, 8), 78], min_run=3) == [Match("a", 1, 1, 7)]
    with pytest.raises(ValueError, match="window is 0"):
        ChunkIndex(window=0)


def test_the_result_does_not_depend_on_the_order_of_adding():
    chunks = [text(seed % 3, 40 + seed) for seed in range(9)]
    prompt = np.concatenate([chunks[8], chunks[7], chunks[2]])
    orders = [np.random.default_rng(seed).permutation(9) for seed in range(10)]
    results = []
    for order in orders:
        index = ChunkIndex()
        index.add_many((f"c{number}", chunks[number]) for number in order)
        results.append(index.match(prompt))
    assert all(result == results[0] for result in results)


@pytest.mark.timeout(60)  # without a bound it would be minutes
def test_repeated_tokens_are_covered_in_bounded_time():
    index = ChunkIndex()
    index.add_many((str(number), np.full(256, 7)) for number in range(2000))
    found = index.match(np.full(8192, 7))
    assert sum(match.length for match in found) > 8000


def test_more_chunks_are_found_in_a_large_index():
    index = ChunkIndex()
    index.add_many((str(number), chunk) for number, chunk in enumerate(text(0, 20_000 * 64).reshape(-1, 64)))
    for number in range(200):
        index.add(f"more {number}", text(number + 1, 64))
    assert [m.key for m in index.match(text(150, 64))] == ["more 149"]


def test_a_match_travels_between_processes():
    match = Match("k", 3, 1, 20)
    assert pickle.loads(pickle.dumps(match)) == match
    assert match.stop == 23
