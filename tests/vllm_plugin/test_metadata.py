"""What the ranks' accounts of one request become."""

import functools

import pytest

from kvblend_rag.vllm_plugin.metadata import ANOTHER_RANK, Outcome, StepOutcome


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_the_rank_that_knows_what_was_wrong_is_heard(lacking):
    ranks = [
        StepOutcome({"r": Outcome(fallback="it is gone" if rank == lacking else ANOTHER_RANK)}) for rank in range(3)
    ]
    assert functools.reduce(StepOutcome.aggregate, ranks).outcomes == {"r": Outcome(fallback="it is gone")}


def test_what_all_did_the_first_one_tells():
    ranks = [StepOutcome({"r": Outcome(recomputed=((0, 16),), tiers={"k": tier})}) for tier in ("memory", "disk")]
    assert functools.reduce(StepOutcome.aggregate, ranks).outcomes["r"].tiers == {"k": "memory"}
    assert ranks[1].aggregate(StepOutcome({"s": Outcome()})).outcomes.keys() == {"r", "s"}
