"""Blended KV stays with those who asked for it: not in plain answers, not with other tenants or other blends."""

import numpy as np
import pytest

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


def same(one, other):
    return one.token_ids == other.token_ids and np.array_equal(one.logprobs, other.logprobs)


def test_blended_requests_are_found_by_the_same_blend_only(rig):
    prompt = rig.prompt(200, 100, total=500)
    rig.reset()
    asked = [("none", 0.15), ("first", 0.15), ("first", 0.3), ("question", 0.15), ("none", 0.15)]
    cached = [rig.ask([prompt], selector=selector, ratio=ratio)[0].report.cached_tokens for selector, ratio in asked]
    assert cached == [0, 0, 0, 0, 384]


def test_a_question_changes_what_the_question_selector_chose(rig):
    context = rig.prompt(200, 100, total=400)[:321]  # ends with the second chunk
    one, other = (np.concatenate([context, rig.tokens(70, seed)]) for seed in (1, 2))
    rig.reset()
    for selector, cached in (("question", 0), ("first", 256)):
        rig.ask([one], selector=selector)
        (answer,) = rig.ask([other], selector=selector)
        assert answer.report.cached_tokens == cached


def test_a_plain_request_still_shares_the_exact_system_prompt(rig):
    system = rig.tokens(140, 31)
    blended = np.concatenate([system, rig.chunks[200], rig.tokens(30, 1)])
    plain = np.concatenate([system, rig.tokens(90, 2)])
    expected = rig.plain(plain)
    rig.fresh([blended], selector="none")
    (answer,) = rig.ask([plain], blend=False)
    assert answer.report.cached_tokens == 128
    assert answer.difference(expected) < TOLERANCE


def test_two_blends_share_the_exact_system_prompt(rig):
    system = rig.tokens(140, 32)
    one, other = (np.concatenate([system, rig.chunks[length], rig.tokens(30, 1)]) for length in (200, 150))
    rig.fresh([one], selector="everything")
    (answer,) = rig.ask([other], selector="everything")
    assert answer.report.cached_tokens == 128
    assert answer.report.blended
    assert answer.difference(rig.plain(other)) < TOLERANCE


def test_blocks_that_the_answer_completes_are_not_shared_either(rig):
    """Nothing of a prompt shorter than a block is in the prefix cache, until decoding fills the block."""
    prompt = rig.prompt(60, total=100, header=10)
    (blended,) = rig.fresh([prompt], 60, selector="none")
    assert blended.report.reused_tokens == 60
    longer = np.concatenate([prompt, np.array(blended.token_ids, np.int32)])
    (answer,) = rig.ask([longer], blend=False)
    assert answer.report.cached_tokens == 0
    assert same(answer, rig.plain(longer))
    # The conversation that goes on finds it.
    rig.fresh([prompt], 60, selector="none")
    (going_on,) = rig.ask([np.concatenate([longer, rig.tokens(5, 1)])], selector="none")
    assert going_on.report.blended or going_on.report.cached_tokens == 128


def test_plain_and_blended_requests_with_the_same_tokens_at_once(rig):
    prompt = rig.prompt(200, 100, total=500)
    rig.plain(prompt)
    rig.reset()
    params = _params(rig)

    async def both():
        import asyncio

        async def one(options):
            async for output in rig.engine.generate([int(token) for token in prompt], params, options=options):
                final = output
            return rig.answer(final)

        wanted = [{"blend": False}, {"selector": "none"}, {"blend": False}, {"selector": "everything"}]
        return await asyncio.gather(*map(one, wanted))

    first, none, third, everything = rig.engine.run(both())
    for answer in (first, third, everything):
        assert answer.difference(rig.plain(prompt)) < TOLERANCE
    assert none.report.reason or none.report.blended


def _params(rig):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=16, temperature=0.0, logprobs=1, ignore_eos=True)


def test_tenants_do_not_see_one_anothers_chunks(rig):
    chunk = rig.tokens(150, 7000)
    rig.store(chunk, tenant="ada")
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(130, 2)])
    (hers,) = rig.fresh([prompt], selector="none", tenant="ada")
    (his,) = rig.ask([prompt], selector="none", tenant="bob")
    assert hers.report.reused_tokens == 150
    assert not his.report.blended
    assert his.report.cached_tokens == 0
    assert same(his, rig.plain(prompt))
    rig.fresh([prompt], selector="none", tenant="ada")
    (nobodys,) = rig.ask([prompt], selector="none")
    assert nobodys.report.cached_tokens == 0
    assert same(nobodys, rig.plain(prompt))
    assert his.report.reason == "the store holds no chunks for this model and ingest context"


def test_tenants_with_the_same_chunk_do_not_share_blended_blocks(rig):
    chunk = rig.tokens(150, 7001)
    for tenant in ("ada", "bob"):
        rig.store(chunk, tenant=tenant)
    prompt = np.concatenate([rig.tokens(20, 1), chunk, rig.tokens(130, 2)])
    rig.reset()
    cached = [
        rig.ask([prompt], selector="none", tenant=tenant)[0].report.cached_tokens for tenant in ("ada", "bob", "ada")
    ]
    assert cached == [0, 0, 256]


def test_real_texts_by_way_of_ingest(rig):
    texts = [
        "The lighthouse at Fennick was built of granite in 1843, and its lamp burned whale oil for thirty years. "
        "Its keeper wrote down the weather every morning in a book that the museum still has.",
        "A ferry leaves for the island every two hours in summer. In winter it sails on market days only, and "
        "takes no more than forty passengers and six carts, for which a separate ticket is sold on the quay.",
    ]
    report = rig.llm.kvblend.ingest(texts, document_ids=["a", "b"], progress=False)
    assert (report.chunks, report.computed, report.present) == (2, 2, 0)
    again = rig.llm.kvblend.ingest(texts, document_ids=["a", "b"], progress=False)
    assert (again.chunks, again.computed, again.present) == (2, 0, 2)
    prompt = "Answer from the documents.\n\n" + "\n\n".join(reversed(texts)) + "\n\nWhen does the ferry sail in winter?"
    rig.reset()
    (plain,) = rig.ask([prompt], blend=False)
    (exact,) = rig.fresh([prompt], selector="everything")
    assert exact.difference(plain) < TOLERANCE
    assert [chunk.key for chunk in exact.report.chunks] == [report.keys[1][0], report.keys[0][0]]
    assert exact.report.recomputed_tokens > 60
    (blended,) = rig.fresh([prompt])
    assert blended.report.selector == "question"
    assert blended.report.reused_tokens > 60
    assert rig.llm.kvblend.release(["a"]) == 1
    (half,) = rig.fresh([prompt], selector="everything")
    assert [chunk.key for chunk in half.report.chunks] == [report.keys[1][0]]
    assert half.difference(plain) < TOLERANCE
