"""Blended KV must not be found by anybody who did not blend alike: private block hashes, on vLLM's own requests."""

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from kvblend_rag.vllm_plugin.scheduler.prefix_cache import isolate, still_computing

BLOCK = 16


@pytest.fixture(scope="module")
def hasher():
    init_none_hash(sha256)
    return get_request_block_hasher(BLOCK, sha256)


@pytest.fixture
def make(hasher):
    def make(tokens, name="r", block_hasher=hasher):
        params = SamplingParams(max_tokens=100)
        return Request(name, [int(t) for t in tokens], params, None, block_hasher=block_hasher)

    return make


PROMPT = np.arange(100)


def test_blocks_in_front_stay_plain_and_all_behind_become_private(make):
    plain, blended = make(PROMPT), make(PROMPT)
    isolate(blended, 2, "digest")
    assert blended.block_hashes[:2] == plain.block_hashes[:2]
    assert not set(blended.block_hashes[2:]) & set(plain.block_hashes)
    assert len(blended.block_hashes) == len(plain.block_hashes) == 6


def test_the_same_blend_finds_itself_and_no_other_blend_does(make):
    one, same, other = (make(PROMPT) for _ in range(3))
    isolate(one, 2, "digest")
    isolate(same, 2, "digest")
    isolate(other, 2, "another")
    assert one.block_hashes == same.block_hashes
    assert not set(one.block_hashes[2:]) & set(other.block_hashes)


@pytest.mark.parametrize("block", [0, 2, 5, 6])
def test_blocks_that_the_answer_completes_are_private_too(make, block):
    """Block 6 is the one that the prompt leaves open: its hash appears while decoding."""
    plain, blended = make(PROMPT), make(PROMPT)
    isolate(blended, block, "digest")
    for token in range(60):
        plain.append_output_token_ids(token)
        blended.append_output_token_ids(token)
    assert len(blended.block_hashes) == len(plain.block_hashes) == 10
    assert blended.block_hashes[:block] == plain.block_hashes[:block]
    assert not set(blended.block_hashes[block:]) & set(plain.block_hashes)


def test_the_same_blend_with_the_same_answer_finds_that_too(make):
    """A preempted request looks for its own blocks, those of the answer among them."""
    one, same = make(PROMPT), make(PROMPT)
    for request in (one, same):
        isolate(request, 3, "digest")
        for token in range(60):
            request.append_output_token_ids(token)
    assert one.block_hashes == same.block_hashes


def test_without_a_prefix_cache_nothing_is_done(make):
    request = make(PROMPT, block_hasher=None)
    isolate(request, 2, "digest")
    assert request.block_hashes == []


@pytest.mark.parametrize(
    ("status", "computed", "expected"),
    [
        (RequestStatus.RUNNING, 0, True),  # admitted in this very step
        (RequestStatus.RUNNING, 31, True),
        (RequestStatus.RUNNING, 32, False),
        (RequestStatus.WAITING, 0, False),
        (RequestStatus.PREEMPTED, 0, False),
    ],
    ids=str,
)
def test_a_hit_on_blocks_that_are_only_being_computed(make, status, computed, expected):
    request, other = make(PROMPT, "a"), make(PROMPT, "b")
    other.status, other.num_computed_tokens = status, computed
    assert still_computing(request, 2, BLOCK, [request, other]) is expected


def test_neither_itself_nor_other_prompts_nor_nothing_hit_count(make):
    request, other = make(PROMPT, "a"), make(PROMPT + 1, "b")
    request.status = other.status = RequestStatus.RUNNING
    assert not still_computing(request, 2, BLOCK, [request, other])
    assert not still_computing(request, 0, BLOCK, [request, make(PROMPT)])
