"""The scheduler's side with a pace: which requests are blended, and what a step may take on while answers run."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from kvblend_rag.blend.chunk import chunk_key, namespace
from kvblend_rag.blend.cost import ForwardPace, Pace
from kvblend_rag.config import BlendConfig
from kvblend_rag.report import TierLoad
from kvblend_rag.store import StoreLayout, open_catalogue
from kvblend_rag.vllm_plugin.metadata import Handshake, Outcome, StepOutcome
from kvblend_rag.vllm_plugin.scheduler.errands import Errands
from kvblend_rag.vllm_plugin.scheduler.scheduler_side import SchedulerSide

BLOCK, CONTEXT, LIMIT = 16, tuple(range(32)), 512
RNG = np.random.default_rng(0)
CHUNKS = [RNG.integers(100, 10_000, 200).astype(np.int32) for _ in range(4)]
HEADER, QUESTION = (RNG.integers(100, 10_000, size).astype(np.int32) for size in (20, 30))
SPACE = namespace("model", CONTEXT)
KEYS = [chunk_key(SPACE, chunk) for chunk in CHUNKS]
TOKEN_BYTES = 1000
PACE = Pace(ForwardPace(0.001, 1e-3, max_tokens=LIMIT), blend=0.001, placed=1e-6, token_bytes=TOKEN_BYTES)
"""A millisecond a token."""
TINY = Pace(ForwardPace(0.001, 1e-7, max_tokens=LIMIT), blend=0.01, placed=1e-6, token_bytes=TOKEN_BYTES)


def load(tier, chunks, nbytes, seconds):
    """What reading so many chunks took."""
    return [TierLoad(tier=tier, chunks=chunks, bytes=nbytes, milliseconds=seconds * 1e3)]


DISK = load("disk", 4, 800 * TOKEN_BYTES, 0.004)


def prompt(*chunks, question=QUESTION):
    return np.concatenate([HEADER, *(CHUNKS[index] for index in chunks), question])


@pytest.fixture
def start(tmp_path):
    """A scheduler's side beside a store of four chunks, by the workers' pace and reads."""
    started = []

    def start(pace=PACE, reads=DISK, **settings):
        config = BlendConfig(store_path=str(tmp_path), selector="first", recompute_ratio=0.1, **settings)
        catalogue = open_catalogue(config)
        catalogue.hold("", KEYS, "")
        for key, chunk in zip(KEYS, CHUNKS, strict=True):
            catalogue.add(key, SPACE, chunk, 0, 1, 1000)
        catalogue.close()
        side = SchedulerSide(
            SimpleNamespace(
                kv_transfer_config=SimpleNamespace(kv_connector_extra_config=config.connector_settings()),
                cache_config=SimpleNamespace(block_size=BLOCK, hash_block_size=None),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=LIMIT),
            )
        )
        side.learn([Handshake("model", CONTEXT, None, 0, 1, pace, tuple(reads))])
        started.append(side)
        return side

    yield start
    for side in started:
        side.close()


@pytest.fixture(scope="module")
def make():
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)

    def make(tokens, name="r", **parameters):
        extra = {"kv_transfer_params": {"kvblend": parameters}}
        params = SamplingParams(max_tokens=10, extra_args=extra)
        return Request(name, [int(token) for token in tokens], params, None, block_hasher=hasher)

    return make


def step(side, **scheduled):
    """A step of (tokens computed before, tokens in this step) by new request."""
    return side.step(
        SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=c) for n, (c, _) in scheduled.items()],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[]),
            num_scheduled_tokens={name: count for name, (_, count) in scheduled.items()},
        )
    )


def ask(side, request, cached=0):
    """Arrive and be claimed; admitted, if anything is."""
    side.arrived(request)
    return claim(side, request, cached)


def claim(side, request, cached=0):
    claimed = side.claim(request, cached)
    if claimed is not None:
        side.admitted(request, list(range(1, 100)), claimed)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = cached + claimed
    return claimed


def reason(side, request):
    return side.finished(request)["kvblend"]["reason"]


def answering(side, make):
    """A request whose answer is running."""
    request = make(RNG.integers(100, 10_000, 40), "answering", blend=False)
    assert ask(side, request) == 0
    request.num_computed_tokens = request.num_prompt_tokens
    step(side, answering=(0, 40))
    return request


def test_what_loads_fast_is_blended_and_what_does_not_is_prefilled_plainly(start, make):
    for reads, pace, why in (
        (DISK, PACE, None),
        (load("disk", 4, 800 * TOKEN_BYTES, 8.0), PACE, "would take longer than computing it"),
        (DISK, TINY, "no chunk could make it faster"),
        ([], PACE, "how fast chunks load from disk is not known yet"),
    ):
        side, request = start(pace, reads), make(prompt(0, 1, 2))
        claimed = ask(side, request)
        blended = step(side, r=(0, 1)).blends
        found = reason(side, request)
        if why is None:
            assert (claimed, len(blended), found) == (len(prompt(0, 1, 2)) - 1, 1, None)
        else:
            assert (claimed, blended) == (0, [])
            assert why in found


def test_a_request_may_have_all_of_it_loaded_whatever_that_takes(start, make):
    side, request = start(TINY), make(prompt(0, 1), planner=False)
    assert ask(side, request) == request.num_prompt_tokens - 1
    off = start(TINY, planner=False)
    assert ask(off, make(prompt(0, 1), "other")) > 0


def test_chunks_in_memory_are_loaded_and_far_ones_computed_and_sent_for(start, make):
    side = start(reads=load("disk", 4, 800 * TOKEN_BYTES, 4.0))
    side.worker_reported(StepOutcome(in_memory={KEYS[0]: True, KEYS[2]: True}))
    request = make(prompt(0, 1, 2))
    ask(side, request)
    planned = step(side, r=(0, 1))
    (job,) = planned.blends
    assert [run.key for run in job.plan.runs] == [KEYS[0], KEYS[2]]
    assert planned.fetch == []
    assert step(side).fetch == [KEYS[1]]
    assert step(side).fetch == []
    side.worker_reported(StepOutcome({"r": Outcome(tiers={KEYS[0]: "memory", KEYS[2]: "memory"})}))
    found = side.finished(request)["kvblend"]
    assert (found["reused_tokens"], found["computed_tokens"]) == (400, 250)
    # The same prompt is blended the same way, so that it finds its blocks in the prefix cache.
    again = make(prompt(0, 1, 2), "again")
    side.worker_reported(StepOutcome(in_memory={KEYS[1]: True}))
    side.arrived(again)
    assert side.claim(again, 0) is None
    assert again.block_hashes == request.block_hashes
    # Another prompt has them all.
    other = make(prompt(2, 1, 0), "other")
    assert ask(side, other)
    (job,) = step(side, other=(0, 1)).blends
    assert len(job.plan.runs) == 3
    # What left memory is on disk again.
    side.worker_reported(StepOutcome(in_memory={KEYS[0]: False}))
    side.worker_reported(StepOutcome({"x": Outcome(tiers={KEYS[2]: "disk"})}))
    last = make(prompt(2, 0), "last")
    assert ask(side, last) == 0


def test_what_is_fetched_for_later_waits_until_no_prefill_runs(start, make):
    """Also when the request that met it is gone by then; in an engine that does nothing but prefill, not for ever."""
    side = start(reads=load("disk", 4, 800 * TOKEN_BYTES, 8.0))
    request = make(prompt(0, 1, 2))
    assert ask(side, request) == 0
    assert step(side, r=(0, 512)).fetch == []
    side.finished(request)
    assert ask(side, make(prompt(1, 3), "next")) == 0
    assert step(side, next=(0, 450)).fetch == []
    assert step(side, next=(450, 1)).fetch == KEYS
    assert step(side).fetch == []
    assert ask(side, make(prompt(2, 3), "last")) == 0
    assert step(side, last=(0, 450)).fetch == []
    side._errands._since -= 60
    assert step(side, other=(0, 450)).fetch == [KEYS[2], KEYS[3]]


def test_not_more_waits_to_be_fetched_than_somebody_will_want():
    errands = Errands()
    errands.add(f"{number}" for number in range(1000))
    errands.add(["0", "late"])
    assert errands.take(prefilling=True) == []
    assert errands.take(prefilling=False) == [f"{number}" for number in range(64)]
    assert errands.take(prefilling=False) == []


def test_a_step_without_a_prefill_tells_the_planner_nothing(start):
    """However many answers it goes on with: a prefill of as many tokens is another matter."""
    side = start()
    step(side, **{f"r{number}": (500, 1) for number in range(64)})
    assert not side._planner._steps
    step(side, r=(0, 64))
    assert list(side._planner._steps) == [2]


def test_a_chunk_that_was_just_computed_is_in_memory(start, make):
    ingest = {"key": KEYS[3], "namespace": SPACE, "start": len(CONTEXT)}
    for settings, expected in (({}, True), ({"local_device": "disk"}, False)):
        side = start(reads=load("disk", 4, 800 * TOKEN_BYTES, 4.0), **settings)
        storing = make([*CONTEXT, *CHUNKS[3]], "storing", ingest=ingest)
        ask(side, storing)
        assert len(step(side, storing=(0, 232)).saves) == 1
        assert bool(ask(side, make(prompt(3)))) == expected


def test_paces_follow_what_is_measured(start, make):
    """Loading turns out to be slow, and is not tried again; then the disk is idle once more."""
    side = start()
    assert ask(side, make(prompt(0, 1), "one"))
    for _ in range(20):
        side.worker_reported(StepOutcome(loads=load("disk", 2, 400 * TOKEN_BYTES, 2.0)))
    assert ask(side, make(prompt(0, 2), "two")) == 0
    for _ in range(20):
        side.worker_reported(StepOutcome(loads=load("disk", 2, 400 * TOKEN_BYTES, 0.002)))
    assert ask(side, make(prompt(1, 2), "three"))


def test_a_blend_that_takes_longer_than_predicted_is_not_blended_again(start, make):
    side = start()
    side.worker_reported(StepOutcome(in_memory=dict.fromkeys(KEYS, True)))
    for number in range(12):
        name = f"r{number}"
        tokens = np.concatenate([RNG.integers(100, 10_000, 20), prompt(0, 1, 2)])
        if not ask(side, make(tokens, name)):
            break
        step(side, **{name: (len(tokens) - 1, 1)})
        side.worker_reported(StepOutcome({name: Outcome()}, blend_seconds={name: 0.9}))
    assert 1 <= number < 11
    assert "would take longer" in side._reports[name].reason
    # vLLM itself turns out to be as slow: then it pays again.
    for _ in range(30):
        step(side, plain=(0, 500))
        side.worker_reported(StepOutcome(step_seconds={side._number: 5.0}))
    assert ask(side, make(prompt(0, 1, 3), "late"))


def test_a_machine_that_is_busy_makes_no_blend_look_fast(start, make):
    """vLLM's steps take three times as long as rehearsed, and no blend was measured yet: it would as well."""
    side = start(Pace(ForwardPace(0.001, 1e-3, max_tokens=LIMIT), 0.2, 1e-6, TOKEN_BYTES))
    side.worker_reported(StepOutcome(in_memory=dict.fromkeys(KEYS, True)))
    for _ in range(5):
        step(side, plain=(0, 500))
        side.worker_reported(StepOutcome(step_seconds={side._number: 1.5}))
    assert ask(side, make(prompt(0))) == 0


def test_a_prompt_that_was_blended_before_finds_its_blocks_whatever_the_pace_is_by_now(start, make):
    side = start()
    one, two = make(prompt(0, 1), "one"), make(prompt(0, 1), "two")
    ask(side, one)
    for _ in range(20):
        side.worker_reported(StepOutcome(loads=load("disk", 2, 400 * TOKEN_BYTES, 9.0)))
    side.arrived(two)
    assert side.claim(two, 0) is None
    assert two.block_hashes == one.block_hashes
    assert side.claim(two, two.num_prompt_tokens // BLOCK * BLOCK) == 0


def test_what_the_prefix_cache_holds_is_cheaper_still(start, make):
    """Behind a hit that leaves 60 tokens, the chunk's rest is not worth a blend's fixed cost."""
    pace = Pace(ForwardPace(0.001, 1e-3, max_tokens=LIMIT), 0.05, 1e-6, TOKEN_BYTES)
    side = start(pace)
    assert ask(side, make(prompt(0), "one"), cached=0)
    assert ask(side, make(prompt(1), "two", planner=True), cached=192) == 0


# Fairness


def test_who_waits_costs_the_scheduler_next_to_nothing(start, make):
    """Every waiting request is asked about in every step: behind the first that waits nobody is looked at."""
    side = start()
    answering(side, make)
    assert ask(side, make(prompt(0, 1), "blend"))
    plain = make(RNG.integers(100, 10_000, 500), "plain", blend=False)
    assert ask(side, plain) is None
    others = [make(prompt(0, 1, 2), f"r{number}") for number in range(3)]
    for request in others:
        side.arrived(request)
    side._planner = None  # is not asked
    side._blends["r0"].plan = None
    assert [side.claim(request, 0) for request in others] == [None] * 3


def test_blends_of_one_step_stay_below_what_a_step_computes_while_answers_run(start, make):
    side = start()
    orders = ((0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1), (3, 0, 1, 2))
    requests = [make(prompt(*order, question=RNG.integers(100, 10_000, 150)), f"r{order[0]}") for order in orders]
    running = answering(side, make)
    tokens = 20 + 150 + 80  # computed, and a tenth of four chunks
    assert 2 * tokens <= LIMIT < 3 * tokens
    for request in requests:
        side.arrived(request)
    steps = []
    waiting = list(requests)
    while waiting:
        claims = [claim(side, request) for request in waiting]
        waiting = [request for request, claimed in zip(waiting, claims, strict=True) if claimed is None]
        done = step(side, answering=(40, 1)).blends
        steps.append([job.request_id for job in done])
        for request in requests:
            request.num_computed_tokens = max(request.num_computed_tokens, request.num_prompt_tokens - 1)
            if request.status == RequestStatus.RUNNING:
                request.num_computed_tokens = request.num_prompt_tokens
    assert steps == [["r0", "r1"], ["r2", "r3"]]
    assert running.status == RequestStatus.RUNNING


def test_nobody_waits_where_no_answer_runs(start, make):
    side = start()
    for number in range(4):
        assert ask(side, make(prompt(number, 1, 2, question=RNG.integers(100, 10_000, 200)), f"r{number}"))
    assert len(step(side).blends) == 4


def test_a_blend_waits_for_the_prefill_that_is_under_way_and_nobody_overtakes_it(start, make):
    side = start()
    answering(side, make)
    long = make(RNG.integers(100, 10_000, 900), "long", blend=False)
    assert ask(side, long) == 0
    long.num_computed_tokens = 400
    blend, later = make(prompt(0, 1), "blend"), make(RNG.integers(100, 10_000, 300), "later", blend=False)
    assert ask(side, blend) is None
    assert ask(side, later) is None
    step(side, long=(400, 500))
    long.num_computed_tokens = 900
    assert claim(side, blend)
    assert claim(side, later) == 0
    assert len(step(side).blends) == 1


def test_an_ordinary_prefill_waits_for_the_step_behind_a_blend(start, make):
    side = start()
    answering(side, make)
    assert ask(side, make(prompt(0, 1), "blend"))
    plain = make(RNG.integers(100, 10_000, 500), "plain", blend=False)
    assert ask(side, plain) is None
    assert len(step(side).blends) == 1
    assert claim(side, plain) == 0


def test_a_blend_that_is_more_than_a_step_is_prefilled_in_steps_while_answers_run(start, make):
    side = start()
    running = answering(side, make)
    huge = prompt(0, 1, 2, 3, question=RNG.integers(100, 10_000, 600))
    request = make(huge, "huge")
    assert ask(side, request) == 0
    assert "hold up running answers" in reason(side, request)
    running.status = RequestStatus.FINISHED_STOPPED
    step(side)
    assert ask(side, make(huge, "alone"))


def test_loading_that_would_hold_up_answers_is_done_beside_them(start, make):
    """Half a second from the disk, where a full step takes half of that: the chunks come near first."""
    pace = Pace(ForwardPace(0.001, 0.5e-3, max_tokens=LIMIT), 0.001, 1e-6, TOKEN_BYTES)
    side = start(pace, reads=load("disk", 4, 800 * TOKEN_BYTES, 0.29))
    answering(side, make)
    request = make(prompt(0, 1, 2, 3), "blend")
    assert ask(side, request) is None
    assert sorted(step(side).fetch) == sorted(KEYS)
    assert claim(side, request) is None
    assert step(side).fetch == []
    side.worker_reported(StepOutcome(in_memory=dict.fromkeys(KEYS, True)))
    assert claim(side, request)
    # They never come: then it does not wait for ever.
    other = start(pace, reads=load("disk", 4, 800 * TOKEN_BYTES, 0.29))
    answering(other, make)
    late = make(prompt(0, 1, 2, 3), "late")
    assert ask(other, late) is None
    other._blends["late"].patience = 0.0
    assert claim(other, late) == 0
    assert "were not loaded in time" in reason(other, late)


def test_remote_tiers(start, make, tmp_path):
    """On disk where its file is; else in the tier it came from last, and in the first one where nobody knows."""
    side = start(
        reads=load("disk", 1, 10**6, 0.001) + load("s3", 1, 10**6, 5.0) + load("valkey", 1, 10**6, 0.001),
        remote=("redis://localhost", "s3://bucket"),
    )
    tier = side._planner.tier
    path = StoreLayout(tmp_path).chunk_path(KEYS[0], (0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert [tier(key).name for key in KEYS[:2]] == ["disk", "valkey"]
    side.worker_reported(StepOutcome({"x": Outcome(tiers={KEYS[1]: "s3"})}))
    assert (tier(KEYS[1]).name, tier(KEYS[1]).remote) == ("s3", True)
    assert ask(side, make(prompt(1), "slow")) == 0
    assert ask(side, make(prompt(2), "fast"))
