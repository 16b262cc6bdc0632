"""What prompts repeat is found without separators, in a table of fixed size; on tokens alone."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from kvblend_rag.serving.learner import LEARNED, Learner
from kvblend_rag.serving.seen import SHORTEST, RepeatSketch
from kvblend_rag.testing import fake_kvblend


def tokens(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 40_000, count).astype(np.int32)


HEADER = tokens(80, 1)
CHUNKS = {name: tokens(length, seed) for name, length, seed in (("a", 120, 2), ("b", 200, 3), ("c", 90, 4))}


def prompt(order: str, seed: int) -> np.ndarray:
    return np.concatenate([HEADER, *(CHUNKS[name] for name in order), tokens(40, 100 + seed)])


def found(sketch: RepeatSketch, order: str, seed: int, **more) -> list[np.ndarray]:
    whole = prompt(order, seed)
    return [whole[start:stop] for start, stop in sketch.observe("", whole, **more)]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) == len(other) and bool((one == other).all())


def test_chunks_in_changing_order_are_found_with_their_very_borders() -> None:
    sketch = RepeatSketch(times=3)
    assert found(sketch, "abc", 1) == []
    assert found(sketch, "cab", 2) == []
    third = found(sketch, "bca", 3)
    assert [name for name in "bca" if any(same(CHUNKS[name], each) for each in third)] == list("bca")
    assert len(third) == 3  # and not the header, which never moved: that is the prefix cache's


def test_the_same_prompt_again_is_the_prefix_caches_business() -> None:
    sketch = RepeatSketch(times=2)
    assert not any(found(sketch, "abc", 1) for _ in range(5))


def test_a_text_twice_in_one_prompt_counts_once() -> None:
    sketch = RepeatSketch(times=2)
    twice = np.concatenate([CHUNKS["a"], tokens(20, 8), CHUNKS["a"]])
    assert sketch.observe("", twice) == []


def test_what_is_stored_or_short_or_anothers_is_left_alone() -> None:
    sketch = RepeatSketch(times=2)
    for seed, order in enumerate(("ab", "ba", "cab")):
        whole = prompt(order, seed)
        start = next(i for i in range(len(whole)) if same(whole[i : i + 120], CHUNKS["a"]))
        learned = sketch.observe("", whole, [(start, start + 120)])
        assert not any(same(whole[a:b], CHUNKS["a"]) for a, b in learned)
    short = tokens(SHORTEST - 1, 9)
    for seed in range(4):
        assert sketch.observe("", np.concatenate([tokens(30 + seed, 200 + seed), short, tokens(30, 300 + seed)])) == []
    for seed, tenant in enumerate(("x", "y", "z")):
        whole = np.concatenate([tokens(20 + seed, 400 + seed), CHUNKS["c"], tokens(20, 500 + seed)])
        assert sketch.observe(tenant, whole) == []


def test_the_table_is_bounded_and_what_repeats_survives_what_does_not() -> None:
    sketch = RepeatSketch(times=3, slots=1 << 14)
    learned = []
    for seed in range(40):  # ten times as many windows as there are slots
        sketch.observe("", tokens(4000, 1000 + seed))
        learned += found(sketch, "abc" if seed % 2 else "cba", seed)
    assert any(same(CHUNKS["b"], each) for each in learned)


@pytest.fixture
def kv(tmp_path):
    with fake_kvblend(store_path=tmp_path / "store", config={"learn_seen": True, "seen_times": 3}) as kv:
        yield kv


def test_a_learner_ingests_when_the_engine_is_idle(kv, monkeypatch) -> None:
    noted = {"idle": 0.0, "prompts": []}
    call = kv.engine.call

    async def answered(method, *arguments):
        if method != "take_seen":
            return await call(method, *arguments)
        taken = {"idle": noted["idle"], "prompts": noted["prompts"][: arguments[0]]}
        noted["prompts"] = noted["prompts"][arguments[0] :]
        return [taken]

    monkeypatch.setattr(kv.engine, "call", answered)
    learner = Learner(kv.engine, lambda tenant: kv.for_tenant(tenant), kv.config)
    noted["prompts"] = [
        {"tenant": "", "token_ids": prompt(order, seed).tolist(), "known": []}
        for seed, order in enumerate(("abc", "cab", "bca"))
    ]
    assert asyncio.run(learner.look())
    assert learner.learned == kv.engine.ingested == 0  # others are being served
    noted["idle"] = 5.0
    while asyncio.run(learner.look()):
        pass
    assert learner.learned == kv.engine.ingested == 3
    held = kv.catalogue.chunks_of([LEARNED])[LEARNED]
    assert set(held) == {key for name in CHUNKS for key, _ in kv.cut(CHUNKS[name].tolist())}
    assert kv.release([LEARNED]) == 3
