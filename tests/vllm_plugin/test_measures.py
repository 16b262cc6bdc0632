"""What workers measure: steps without their blends, reads by tier, what is in memory; no engine is needed."""

import itertools
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")


from kvblend_rag.blend.cost import ForwardPace, Pace, Work
from kvblend_rag.errors import ChunkMissing
from kvblend_rag.report import TierLoad
from kvblend_rag.selectors import names
from kvblend_rag.selectors.base import Evidence
from kvblend_rag.store import Catalogue, DiskStore, MemoryStore, StoredChunk, TieredStore
from kvblend_rag.store.listing import put_and_list
from kvblend_rag.vllm_plugin.metadata import Outcome, Recipe
from kvblend_rag.vllm_plugin.scheduler.planner import effort_of
from kvblend_rag.vllm_plugin.worker.evidence import shares
from kvblend_rag.vllm_plugin.worker.rehearsal import Rehearsal, Shelf
from kvblend_rag.vllm_plugin.worker.scout import Scout
from kvblend_rag.vllm_plugin.worker.stopwatch import Stopwatch


def chunk(number, tokens=8):
    token_ids = np.arange(number * 1000, number * 1000 + tokens, dtype=np.int32)
    return StoredChunk(f"{number:032x}", "space", token_ids, torch.full((2, 2, tokens, 1, 4), float(number)))


def test_a_blend_is_no_part_of_its_step():
    watch = Stopwatch(torch.device("cpu"))
    with watch.step(7):
        time.sleep(0.02)
        with watch.blend("a"):
            time.sleep(0.05)
    with watch.step(8):
        pass
    steps, blends = watch.take()
    assert list(steps) == [7, 8]
    assert steps[7] >= 0.02
    assert steps[8] < steps[7]
    assert blends["a"] >= 0.05
    assert watch.take() == ({}, {})


@pytest.fixture
def store(tmp_path):
    catalogue = Catalogue(tmp_path)
    store = TieredStore([MemoryStore(3 * chunk(0).kv.nbytes), DiskStore(tmp_path, catalogue=catalogue)])
    yield store
    store.close()


def test_reads_are_counted_by_the_tier_they_came_from(store):
    for number in range(5):
        store.put(chunk(number))
    loads = []
    store.get_many([chunk(4).key, chunk(0).key, chunk(1).key, chunk(4).key], loads)
    size = chunk(0).kv.nbytes
    assert {load.tier: (load.chunks, load.bytes) for load in loads} == {"memory": (1, size), "disk": (2, 2 * size)}
    assert all(load.milliseconds > 0 for load in loads)
    with pytest.raises(ChunkMissing):
        store.get_many([chunk(2).key, "f" * 32], loads)
    assert len(loads) == 3  # what could be read before that is told too
    store.get_many([chunk(2).key])
    assert len(loads) == 3


def test_what_came_to_memory_and_left_it(store):
    for number in range(5):
        store.put(chunk(number))
    assert store.take_changes() == {chunk(number).key: number >= 2 for number in range(5)}
    assert store.take_changes() == {}
    store.read(chunk(0).key)
    assert store.take_changes() == {chunk(0).key: True, chunk(2).key: False}
    store.delete([chunk(0).key])
    assert store.take_changes() == {chunk(0).key: False}


def test_a_scout_measures_what_is_stored_and_fetches_what_is_asked_for(tmp_path, store):
    catalogue = Catalogue(tmp_path)
    put_and_list(store, catalogue, [chunk(number) for number in range(6)], (0, 1))
    assert sorted(catalogue.sample(3)) == sorted(set(catalogue.sample(3)))
    scout = Scout(store)
    scout.measure(catalogue)
    loads = scout.take_loads()
    assert sum(load.chunks for load in loads if load.tier == "disk") >= 3
    assert scout.take_loads() == []
    far = [key for key in (chunk(number).key for number in range(6)) if not store.tiers[0].contains(key)]
    scout.fetch(["f" * 32])  # there is no such chunk, and nobody is told
    scout.fetch(far[:2])
    deadline = time.monotonic() + 20
    while not all(store.tiers[0].contains(key) for key in far[:2]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    scout.close()
    scout.close()
    assert not scout._thread.is_alive()
    catalogue.close()


class Tier:
    def __init__(self, *keys, remote=False, takes=False):
        self.keys, self.remote, self.takes = set(keys), remote, takes

    def contains(self, key):
        return key in self.keys


@pytest.mark.parametrize(
    ("tiers", "seconds", "expected"),
    [
        # what has room is fetched, all of it
        ([Tier(takes=True), Tier(remote=True)], 3600.0, ["a", "b", "c", "d"]),
        # nothing near has room: the first is tried, and then one chunk now and then
        ([Tier(), Tier(remote=True)], 3600.0, ["a", "b"]),
        ([Tier(), Tier(remote=True)], 0.0, ["a", "b", "c"]),
        # on the disk it is already, and no memory takes it
        ([Tier(), Tier("a", "b", "c", "d")], 3600.0, ["a", "b"]),
        # in memory it is already, which says nothing of what may come there
        ([Tier("a", "b", takes=True), Tier("c", "d")], 3600.0, ["a", "b", "c", "d"]),
        # there is but one place
        ([Tier("a", "b", "c", "d")], 3600.0, ["a"]),
    ],
)
def test_what_comes_no_nearer_is_read_only_now_and_then(monkeypatch, tiers, seconds, expected):
    """It tells nothing but how fast its tier is, and takes time from the engine."""
    monkeypatch.setattr("kvblend_rag.vllm_plugin.worker.scout._BETWEEN_MEASURES_S", seconds)
    read, near = [], [(tier, set(tier.keys)) for tier in tiers]

    def get_many(keys, loads):
        read.extend(keys)
        loads.append(TierLoad(tier="valkey", chunks=1, bytes=1, milliseconds=1.0))
        for tier, _ in near:
            if tier.takes:
                tier.keys |= set(keys)

    scout = Scout(SimpleNamespace(tiers=tiers, get_many=get_many))
    for keys in (["a", "b"], ["c", "d"]):
        scout.fetch(keys)
    deadline = time.monotonic() + 20
    while scout._queue.qsize() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # the last was taken out, and may just be read
    scout.close()
    for tier, keys in near:
        tier.keys = keys
    assert read == expected


@pytest.mark.parametrize("selector", sorted(names()))
def test_what_a_selector_makes_a_worker_compute(selector):
    share = shares(Paged)
    # of the six far-sighted layers, the last four, of which the last is 10
    assert share == {Evidence.QUESTION_ATTENTION: 11 / 12, Evidence.DEVIATION: 2 / 12}
    pace = Pace(ForwardPace(1.0, 1.0), 0.0, 0.0, 1, *share.values())
    effort = effort_of(Recipe(selector, 0.2, 16), pace)
    wanted = {"question": (11 / 12, 0.0), "deviation": (0.0, 2 / 12)}
    assert (effort.computed_share, effort.whole_share) == wanted.get(selector, (0.0, 0.0))
    assert effort.ratio == {"everything": 1.0, "none": 0.0}.get(selector, 0.2)
    assert effort.span == 16
    at_most = effort_of(Recipe(selector, 0.2, 16), None)
    assert at_most.computed_share >= effort.computed_share
    assert at_most.whole_share >= effort.whole_share


class Clock:
    """A device whose time is what the paces say, so that a rehearsal can be checked to the digit."""

    fixed, token, pair, row, blend, placed = 0.003, 1e-4, 1e-9, 2e-5, 0.004, 1e-6

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("kvblend_rag.vllm_plugin.worker.rehearsal.time.perf_counter", lambda: self.now)
        self.pace = ForwardPace(self.fixed, self.token, self.pair, self.row)


class Forward:
    max_tokens, max_rows = 2048, 64

    def __init__(self, clock):
        self.clock = clock
        self.seen = []

    def run(self, rows):
        ranges = [(row.start, row.stop) for row in rows]
        self.seen += rows
        self.clock.now += self.clock.pace.seconds(Work.of(ranges))


ALONE = SimpleNamespace(least=lambda number: number)
"""One rank."""

LAYERS = [SimpleNamespace(sees_all=number % 2 == 0, number=number) for number in range(12)]
"""Every other one sees a window only."""


class Paged:
    """As much of a paged cache as a rehearsal looks at."""

    block_size, dtype, device, layers = 16, torch.float32, torch.device("cpu"), LAYERS

    @staticmethod
    def chunk_shape(tokens):
        return 12, 2, tokens, 2, 8


@pytest.mark.parametrize(("blocks", "longest"), [(500, 4096), (40, 4096), (500, 300)])
def test_a_rehearsal_finds_the_pace(monkeypatch, blocks, longest):
    clock, paged = Clock(monkeypatch), Paged()
    forward, shelf, jobs = Forward(clock), Shelf(paged), []

    def blend(job):
        jobs.append(job)
        found = shelf.get_many(run.key for run in job.plan.runs)
        assert [found[run.key][0].shape[2] >= run.length for run in job.plan.runs] == [True] * len(job.plan.runs)
        computed = [(start, min(stop, job.plan.prompt_tokens - 1)) for start, stop in job.plan.computed_ranges()]
        clock.now += clock.blend + clock.placed * job.plan.reused_tokens
        clock.now += clock.pace.seconds(Work.of(computed) + effort_of(job.recipe, None).recomputed(job.plan))
        return Outcome()

    small = Rehearsal(paged, forward, blend, shelf, ALONE, blocks=5, max_model_len=longest, vocabulary=100)
    assert small.run(Recipe("first", 0.15, 16)) is None
    rehearsal = Rehearsal(paged, forward, blend, shelf, ALONE, blocks=blocks, max_model_len=longest, vocabulary=100)
    pace = rehearsal.run(Recipe("first", 0.15, 16))
    room = min(longest - 1, (blocks - 1) * 16)
    assert all(0 <= row.start < row.stop <= room for row in forward.seen)
    assert all(row.block_ids.max() < blocks and row.block_ids.min() > 0 for row in forward.seen)
    assert all(job.plan.prompt_tokens <= room for job in jobs)
    for work in (Work.of([(0, 64)]), Work.of([(0, 900)]), Work.of([(1000, 1200)]), Work(128, 60_000, 8)):
        assert pace.forward.seconds(work) == pytest.approx(clock.pace.seconds(work), rel=0.05)
    assert pace.blend == pytest.approx(clock.blend, rel=0.1)
    assert pace.placed == pytest.approx(clock.placed, rel=0.3)
    assert pace.token_bytes == 12 * 2 * 2 * 8 * 4
    assert (pace.question_share, pace.deviation_share) == (11 / 12, 2 / 12)


def test_a_rehearsal_is_not_deceived_by_passes_that_take_a_gpu_no_longer_than_one_token(monkeypatch):
    """A few hundred tokens take as long as the host needs to ask for them."""
    clock, paged = Clock(monkeypatch), Paged()
    forward, shelf = Forward(clock), Shelf(paged)
    clock.pace = ForwardPace(0.004, 2.2e-5, 7e-10, 1e-6, least=0.0133)
    forward.max_tokens, forward.max_rows = 8192, 1024

    def blend(job):
        forward.run([SimpleNamespace(start=start, stop=stop) for start, stop in job.plan.computed_ranges()])
        return Outcome()

    rehearsal = Rehearsal(paged, forward, blend, shelf, ALONE, blocks=3000, max_model_len=16_384, vocabulary=100)
    pace = rehearsal.run(Recipe("none", 0.0, 16)).forward
    assert pace.seconds(Work.of([(0, 1)])) == pytest.approx(clock.pace.least)
    # The shortest pass is as long as the host's part alone, so what is fixed looks larger than it is.
    for work, off in ((Work.of([(0, 6000)]), 0.05), (Work.of([(0, 3000)]), 0.05), (Work.of([(8000, 8500)]), 0.2)):
        assert pace.seconds(work) == pytest.approx(clock.pace.seconds(work), rel=off)


@pytest.mark.parametrize(("encoding", "smaller"), [("none", 1.0), ("int8", 3.0), ("fp8", 3.0), ("int4", 2.0)])
def test_a_rehearsal_goes_by_chunks_as_the_store_gives_them(encoding, smaller):
    shelf, paged = Shelf(Paged, encoding), Paged()
    shelf.put("a", 256)
    kv, tier = shelf.get_many(["a"])["a"]
    assert (tuple(kv.shape), tier) == (paged.chunk_shape(256), "memory")
    assert getattr(kv, "encoding", "none") == encoding
    whole = 12 * 2 * 2 * 8 * 4
    assert shelf.token_bytes() == pytest.approx(kv.nbytes / 256, rel=0.01)
    assert whole / shelf.token_bytes() >= smaller


@pytest.mark.parametrize("first", [1, 5, 34, 40, 50])
def test_what_disturbs_the_machine_for_a_while_makes_no_pass_look_slow(monkeypatch, first):
    """Five passes in a row take ten times as long: all that were made of a kind, were each kind timed for itself."""
    clock, paged = Clock(monkeypatch), Paged()
    forward, shelf = Forward(clock), Shelf(paged)
    quiet, passes = forward.run, itertools.count()

    def run(rows):
        before, disturbed = clock.now, first <= next(passes) < first + 5
        quiet(rows)
        clock.now += 9 * (clock.now - before) * disturbed

    forward.run = run

    def blend(job):
        run([SimpleNamespace(start=start, stop=stop) for start, stop in job.plan.computed_ranges()])
        return Outcome()

    rehearsal = Rehearsal(paged, forward, blend, shelf, ALONE, blocks=500, max_model_len=4096, vocabulary=100)
    pace = rehearsal.run(Recipe("none", 0.0, 16))
    for work in (Work.of([(0, 64)]), Work.of([(0, 900)]), Work.of([(1000, 1200)])):
        assert pace.forward.seconds(work) == pytest.approx(clock.pace.seconds(work), rel=0.05)


def test_ranks_compute_the_same_passes_as_often_whatever_their_clocks_say(monkeypatch):
    """Else one would wait for the others' part of a pass for ever."""
    asked, seen = [], []

    def least(number):
        asked.append(number)
        return 70 if len(asked) == 2 else 5

    for hurry in (1.0, 1.7):
        asked.clear()
        clock, paged = Clock(monkeypatch), Paged()
        clock.pace = ForwardPace(clock.fixed * hurry, clock.token * hurry)
        forward, shelf = Forward(clock), Shelf(paged)
        ranks = SimpleNamespace(least=least)
        Rehearsal(paged, forward, lambda job: None, shelf, ranks, blocks=500, max_model_len=4096, vocabulary=100).run(
            Recipe("none", 0.0, 16)
        )
        seen.append([(row.start, row.stop) for row in forward.seen])
    assert seen[0] == seen[1]
    assert len(asked) == 3


def test_a_rehearsal_that_fails_ends_no_start(monkeypatch, caplog):
    def blend(job):
        raise RuntimeError("CUDA out of memory")

    paged, clock = Paged(), Clock(monkeypatch)
    rehearsal = Rehearsal(
        paged, Forward(clock), blend, Shelf(paged), ALONE, blocks=500, max_model_len=4096, vocabulary=100
    )
    assert rehearsal.run(Recipe("first", 0.15, 16)) is None
    assert "its rehearsal failed (CUDA out of memory)" in caplog.text
