"""The scheduler's side without an engine: what is claimed, planned and reported, on vLLM's own requests."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvblend_rag.blend.chunk import chunk_key, namespace
from kvblend_rag.calibration.verdict import Verdict, write_verdict
from kvblend_rag.config import BlendConfig
from kvblend_rag.store import open_catalogue
from kvblend_rag.vllm_plugin.metadata import Handshake, Outcome, StepOutcome
from kvblend_rag.vllm_plugin.scheduler.scheduler_side import SchedulerSide

BLOCK, CONTEXT, LIMIT = 16, tuple(range(32)), 512
RNG = np.random.default_rng(0)
CHUNK, HEADER, QUESTION = (RNG.integers(100, 10_000, size).astype(np.int32) for size in (80, 20, 30))
PROMPT = np.concatenate([HEADER, CHUNK, QUESTION])
SPACE = namespace("model", CONTEXT)
KEY = chunk_key(SPACE, CHUNK)


@pytest.fixture
def side(tmp_path):
    config = BlendConfig(store_path=str(tmp_path), selector="first", recompute_ratio=0.25)
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=config.connector_settings()),
        cache_config=SimpleNamespace(block_size=BLOCK, hash_block_size=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=LIMIT),
    )
    with_chunk = open_catalogue(config)
    with_chunk.hold("", [KEY], "")
    with_chunk.add(KEY, SPACE, CHUNK, 0, 1, 1000)
    with_chunk.close()
    side = SchedulerSide(vllm_config)
    side.learn([Handshake("model", CONTEXT, None, 0, 1)])
    yield side
    side.close()


@pytest.fixture(scope="module")
def hasher():
    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


@pytest.fixture
def make(hasher):
    def make(tokens=PROMPT, name="r", parameters=None, salt=None, **sampling):
        extra = None if parameters is None else {"kv_transfer_params": {"kvblend": parameters}}
        params = SamplingParams(max_tokens=10, extra_args=extra, **sampling)
        tokens = [int(token) for token in tokens]
        return Request(name, tokens, params, None, cache_salt=salt, block_hasher=hasher)

    return make


def step(**scheduled):
    """A scheduler's step: (tokens computed before, tokens in this step) by new request."""
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=n, num_computed_tokens=c) for n, (c, _) in scheduled.items()],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[], new_block_ids=[]),
        num_scheduled_tokens={name: count for name, (_, count) in scheduled.items()},
    )


def report(side, request):
    return side.finished(request)["kvblend"]


def test_a_request_is_matched_claimed_and_blended(side, make):
    request = make()
    side.arrived(request)
    assert side.claim(request, 0) == len(PROMPT) - 1
    side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
    (job,) = side.step(step(r=(len(PROMPT) - 1, 1))).blends
    assert (job.first, job.block_ids.tolist()) == (0, list(range(1, 10)))
    assert [(run.key, run.start, run.length) for run in job.plan.runs] == [(KEY, 20, 80)]
    side.worker_reported(StepOutcome({"r": Outcome(recomputed=((20, 40),), tiers={KEY: "disk"})}))
    found = report(side, request)
    assert (found["reused_tokens"], found["recomputed_tokens"], found["computed_tokens"]) == (60, 20, 50)
    assert found["blended"]
    assert found["reason"] is None
    assert found["chunks"][0]["tier"] == "disk"


def test_a_request_that_ends_with_its_first_token_is_reported_too(side, make):
    """It is answered before the workers' account is read, and sent after."""
    request = make()
    side.arrived(request)
    side.claim(request, 0)
    side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
    side.step(step(r=(len(PROMPT) - 1, 1)))
    answer = side.finished(request)
    side.worker_reported(StepOutcome({"r": Outcome(recomputed=((20, 40),))}))
    assert answer["kvblend"]["recomputed_tokens"] == 20
    assert side.take_stats().data["tokens"] == {"reused": 60, "recomputed": 20, "computed": 50}
    assert side.take_stats().is_empty()


def test_a_fallback_is_no_blend(side, make):
    request = make()
    side.arrived(request)
    side.claim(request, 0)
    side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
    side.step(step(r=(len(PROMPT) - 1, 1)))
    side.worker_reported(StepOutcome({"r": Outcome(fallback="it is gone")}))
    found = report(side, request)
    assert (found["blended"], found["reason"]) == (False, "it is gone")
    assert (found["reused_tokens"], found["computed_tokens"]) == (0, len(PROMPT))


@pytest.mark.parametrize(
    ("cached", "claimed"),
    [(0, 129), (16, 113), (48, 81), (64, 65), (96, 0), (128, 0)],
    ids=str,
)
def test_what_is_claimed_behind_a_prefix_cache_hit(side, make, cached, claimed):
    """Behind 96 tokens, 4 of the chunk are left: too few to reuse."""
    request = make()
    side.arrived(request)
    assert side.claim(request, cached) == claimed


def test_asking_again_changes_nothing(side, make):
    request = make()
    side.arrived(request)
    first = side.claim(request, 0)
    hashes = list(request.block_hashes)
    assert side.claim(request, 0) == first
    assert request.block_hashes == hashes


def test_the_same_prompt_later_looks_again_under_its_private_hashes(side, make):
    for name in ("one", "two"):
        request = make(name=name)
        side.arrived(request)
        claims = [side.claim(request, 0), side.claim(request, 0)]
        assert claims == ([129, 129] if name == "one" else [None, 129])


def test_after_a_preemption_the_report_still_tells_of_the_blend(side, make):
    request = make()
    side.arrived(request)
    side.claim(request, 0)
    side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
    side.step(step(r=(len(PROMPT) - 1, 1)))
    side.worker_reported(StepOutcome({"r": Outcome(recomputed=((20, 40),))}))
    request.num_preemptions = 1
    assert side.claim(request, 128) == 0
    side.admitted(request, list(range(1, 10)), 0)
    found = report(side, request)
    assert found["blended"]
    assert found["reason"] is None
    assert found["cached_tokens"] == 0
    assert found["reused_tokens"] == 60


def test_an_aborted_request_leaves_nothing(side, make):
    request = make()
    side.arrived(request)
    side.claim(request, 0)
    side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
    side.finished(request)
    assert side.step(step()).blends == []
    side.worker_reported(StepOutcome({"r": Outcome()}))  # late, and of nobody any more


@pytest.mark.parametrize(
    ("parameters", "sampling", "why"),
    [
        ({"blend": False}, {}, "asked for an ordinary prefill"),
        ({"nonsense": 1}, {}, "no blending option"),
        ([], {}, "must be a mapping"),
        ({"ingest": {}}, {}, "must hold a key"),
        ({"tenant": "b"}, {}, "holds no chunks"),
        (None, {"prompt_logprobs": 1}, "prompt log-probabilities"),
        (None, {"skip_reading_prefix_cache": True}, "skips the prefix cache"),
    ],
    ids=str,
)
def test_requests_that_are_not_blended_say_why_and_claim_nothing(side, make, parameters, sampling, why):
    request, plain = make(parameters=parameters, **sampling), make()
    side.arrived(request)
    assert side.claim(request, 16) == 0
    side.admitted(request, list(range(1, 10)), 0)
    assert side.step(step(r=(16, 114))).blends == []
    found = report(side, request)
    assert why in found["reason"]
    assert not found["blended"]
    assert request.block_hashes == plain.block_hashes
    assert found["computed_tokens"] + found["cached_tokens"] == len(PROMPT)


def ingest(tokens, **changes):
    return {"ingest": {"key": chunk_key(SPACE, tokens), "namespace": SPACE, "start": len(CONTEXT), **changes}}


def test_a_chunk_is_saved_in_the_step_that_completes_it(side, make):
    request = make([*CONTEXT, *CHUNK], parameters=ingest(CHUNK))
    side.arrived(request)
    assert side.claim(request, 32) == 0
    side.admitted(request, [4, 5, 6, 7, 8], 0)
    assert side.step(step(r=(32, 40))).saves == []
    (job,) = side.step(step(r=(72, 40))).saves
    assert (job.key, job.start, job.stop, job.block_ids.tolist()) == (KEY, 32, 112, [4, 5, 6, 7, 8])
    assert side.step(step()).saves == []


@pytest.mark.parametrize(
    ("tokens", "parameters"),
    [
        ([*CONTEXT, *CHUNK], ingest(CHUNK, key="0" * 32)),
        ([*CONTEXT, *CHUNK], ingest(CHUNK, namespace="0" * 32)),
        ([*CONTEXT, *CHUNK], ingest(CHUNK, start=31)),
        ([*CONTEXT[1:], 5, *CHUNK], ingest(CHUNK)),
        (CHUNK, ingest(CHUNK, start=0)),
        (CONTEXT, ingest(np.zeros(0, np.int32))),
        (CHUNK, ingest(np.zeros(0, np.int32), start=500)),
    ],
    ids=["key", "namespace", "start", "context", "no context", "empty", "behind the end"],
)
def test_what_is_not_a_chunk_behind_the_ingest_context_is_not_saved(side, make, tokens, parameters):
    request = make(tokens, parameters=parameters)
    side.arrived(request)
    side.claim(request, 0)
    side.admitted(request, list(range(1, 10)), 0)
    assert side.step(step(r=(0, len(tokens)))).saves == []
    assert "nothing was stored" in report(side, request)["reason"]


def beside_a_verdict(tmp_path, **changes):
    """A side that starts beside a verdict on its model and context."""
    config = BlendConfig(store_path=str(tmp_path))
    verdict = Verdict(
        status="accepted",
        reason="it keeps too little",
        model="model",
        fingerprint="model",
        context="document",
        context_digest=SPACE,
        settings={"selector": "first", "recompute_ratio": 0.4},
    )
    path = write_verdict(replace(verdict, **changes), tmp_path)
    if changes.get("model") == "broken":
        path.write_text("{")
    with_chunk = open_catalogue(config)
    with_chunk.hold("", [KEY], "")
    with_chunk.add(KEY, SPACE, CHUNK, 0, 1, 1000)
    with_chunk.close()
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=config.connector_settings()),
        cache_config=SimpleNamespace(block_size=BLOCK, hash_block_size=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=LIMIT),
    )
    side = SchedulerSide(vllm_config)
    side.learn([Handshake("model", CONTEXT, None, 0, 1)])
    return side


def test_an_accepting_verdict_sets_the_defaults(tmp_path, make):
    side = beside_a_verdict(tmp_path)
    for name, parameters, ratio in (("one", None, 0.4), ("two", {"ratio": 0.1}, 0.1)):
        request = make(name=name, parameters=parameters)
        side.arrived(request)
        side.claim(request, 0)
        side.admitted(request, list(range(1, 10)), len(PROMPT) - 1)
        (job,) = side.step(step(**{name: (len(PROMPT) - 1, 1)})).blends
        assert (job.recipe.selector, job.recipe.ratio) == ("first", ratio)
    side.close()


def test_an_undecided_verdict_changes_nothing(tmp_path, make, caplog):
    side = beside_a_verdict(tmp_path, status="undecided", settings={})
    assert any("has not been calibrated" in each.message for each in caplog.records)
    request = make()
    side.arrived(request)
    assert side.claim(request, 0) == len(PROMPT) - 1
    side.close()


def test_a_refusing_verdict_blends_nothing_and_still_ingests(tmp_path, make):
    side = beside_a_verdict(tmp_path, status="refused", settings={})
    request = make()
    side.arrived(request)
    assert side.claim(request, 0) == 0
    assert report(side, request)["reason"] == "calibration refused this model: it keeps too little"
    request = make([*CONTEXT, *CHUNK], parameters=ingest(CHUNK))
    side.arrived(request)
    side.claim(request, 32)
    side.admitted(request, [4, 5, 6, 7, 8], 0)
    assert len(side.step(step(r=(32, 80))).saves) == 1
    side.close()


def test_a_verdict_that_can_not_be_read_is_taken_for_a_refusal(tmp_path, make):
    side = beside_a_verdict(tmp_path, model="broken")
    request = make()
    side.arrived(request)
    assert side.claim(request, 0) == 0
    assert "can't be used" in report(side, request)["reason"]
    side.close()


def test_without_a_verdict_it_is_said_once(side, caplog):
    caplog.clear()
    side.learn([Handshake("other model", CONTEXT, None, 0, 1)])
    assert len([each for each in caplog.records if "has not been calibrated" in each.message]) == 1


def test_without_a_handshake_or_with_a_refusal_nothing_is_blended(tmp_path, make):
    config = BlendConfig(store_path=str(tmp_path))
    vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=config.connector_settings()),
        cache_config=SimpleNamespace(block_size=BLOCK, hash_block_size=None),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=LIMIT),
    )
    for handshakes, why in (([], "workers did not report"), ([Handshake("", (), "it is odd", 0, 1)], "it is odd")):
        side = SchedulerSide(vllm_config)
        side.learn(handshakes)
        request = make()
        side.arrived(request)
        assert side.claim(request, 0) == 0
        assert why in report(side, request)["reason"]
        side.close()


def test_a_salted_request_sees_the_chunks_of_its_salt_alone(side, make):
    config = BlendConfig(store_path=side._config.store_path)
    salted = chunk_key(namespace("model", CONTEXT, "bob"), CHUNK)
    catalogue = open_catalogue(config)
    reasons = []
    for salt in ("bob", "eve"):
        request = make(name=salt, salt=salt)
        side.arrived(request)
        assert side.claim(request, 0) == 0
        reasons.append(report(side, request)["reason"])
    assert set(reasons) == {"the store holds no chunks for this model and ingest context"}
    catalogue.hold("", [salted], "bob")
    catalogue.add(salted, namespace("model", CONTEXT, "bob"), CHUNK, 0, 1, 1000)
    claims = {}
    for name, salt, parameters in (
        ("b", "bob", None),
        ("e", "eve", None),
        ("p", None, None),
        ("x", "bob", {"tenant": "eve"}),
    ):
        request = make(name=name, salt=salt, parameters=parameters)
        side.arrived(request)
        claims[name] = side.claim(request, 0)
        if claims[name]:
            side.admitted(request, list(range(1, 10)), claims[name])
    jobs = {job.request_id: [run.key for run in job.plan.runs] for job in side.step(step(b=(0, 1), p=(0, 1))).blends}
    assert jobs == {"b": [salted], "p": [KEY]}
    assert (claims["e"], claims["x"]) == (0, 0)
    catalogue.close()


_NAMES = st.sampled_from(
    [
        "blend",
        "exact",
        "selector",
        "ratio",
        "span",
        "layers",
        "coverage",
        "full_prefill_share",
        "max_risk",
        "on_risk",
        "second_opinion",
        "second_opinion_streams",
        "planner",
        "tenant",
        "ingest",
        "key",
        "namespace",
        "start",
        "nonsense",
    ]
)
_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20), st.just("\ud800")
)
_ANYTHING = st.recursive(
    _SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_NAMES, inner, max_size=3))
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parameters=st.one_of(st.dictionaries(_NAMES, _ANYTHING, max_size=4), _ANYTHING), salt=st.sampled_from([None, "s"])
)
def test_no_options_of_a_request_can_stop_the_scheduler(side, make, parameters, salt):
    request = make(parameters=parameters, salt=salt)
    side.arrived(request)
    assert side.claim(request, 0) in (None, 0, len(PROMPT) - 1)
    report = side.finished(request)["kvblend"]
    assert report["reason"] is None or "\n" not in report["reason"]
