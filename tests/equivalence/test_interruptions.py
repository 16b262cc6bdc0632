"""Preempted requests give the plain answer, and aborted ones leave the engine as it was.

The cache has 23 blocks of 128 tokens. ``rig.reset`` fails while one of them is in use, so it finds leaks.
"""

import asyncio

import numpy as np
import pytest

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


def _preemptions():
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(metric.value for metric in get_metrics_snapshot() if metric.name == "vllm:num_preemptions")


def test_preempted_requests(rig):
    """Seven prompts of three blocks fit in, and their answers need a fourth each: some begin again."""
    prompts = [rig.prompt(200, 60, total=370 + place, seed=place) for place in range(8)]
    plain = [rig.plain(prompt, 40) for prompt in prompts]
    before = _preemptions()
    answers = rig.fresh(prompts, 40, selector="everything")
    assert _preemptions() > before
    for answer, expected, prompt in zip(answers, plain, prompts, strict=True):
        assert answer.difference(expected) < TOLERANCE
        assert answer.report.blended
        assert answer.report.reason is None
        assert answer.report.prompt_tokens == len(prompt)


def test_preempted_blends_keep_their_accounts(rig):
    prompts = [rig.prompt(200, 60, total=370 + place, seed=place) for place in range(8)]
    before = _preemptions()
    answers = rig.fresh(prompts, 40, selector="question", ratio=0.2)
    assert _preemptions() > before
    for answer in answers:
        report = answer.report
        groups = (report.cached_tokens, report.reused_tokens, report.recomputed_tokens, report.computed_tokens)
        assert sum(groups) == report.prompt_tokens
        assert report.blended
        assert report.reused_tokens > 0
    (alone,) = rig.fresh(prompts[:1], 16, selector="question", ratio=0.2)
    assert alone.token_ids == answers[0].token_ids[:16]


def test_preempted_ingests(rig):
    """Long answers fill the cache while chunks are computed; what is stored is right all the same."""
    chunks = [rig.tokens(400, 8000 + place) for place in range(6)]
    context = rig.info.context
    prompts = [rig.prompt(100, total=240, seed=place) for place in range(4)]

    async def both():
        async def answer(prompt):
            from vllm import SamplingParams

            params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
            async for _ in rig.engine.generate([int(token) for token in prompt], params, options={"blend": False}):
                pass

        async def ingest(chunk):
            options = {"ingest": {"key": rig.key(chunk), "namespace": rig.space(), "start": len(context)}}
            async for _ in rig.engine.generate([*context, *map(int, chunk)], rig.engine.one_token(), options=options):
                pass

        await asyncio.gather(*map(answer, prompts), *map(ingest, chunks))

    rig.llm.kvblend.catalogue.hold("", [rig.key(chunk) for chunk in chunks], "")
    rig.engine.run(both())
    assert rig.call("flush") == [{}]
    for chunk in chunks:
        prompt = [*context, *chunk, *rig.tokens(20, 1)]
        (answer,) = rig.fresh([prompt], selector="none")
        assert answer.report.reused_tokens == 400
        assert answer.difference(rig.plain(prompt)) < TOLERANCE


@pytest.mark.parametrize("after", [0, 1, 5], ids=lambda count: f"after {count} tokens")
@pytest.mark.parametrize("selector", ["everything", "question"])
def test_after_an_abort(rig, after, selector):
    prompt = rig.prompt(200, 100, total=600)
    others = [rig.prompt(150, 60, total=400, seed=place) for place in range(3)]
    expected = [rig.plain(other) for other in others]
    rig.reset()

    async def abort():
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        stream = rig.llm.stream([int(token) for token in prompt], params, blend={"selector": selector})
        waiting = asyncio.ensure_future(anext(stream))
        for _ in range(after):
            await waiting
            waiting = asyncio.ensure_future(anext(stream))
        if not after:
            await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()

    asyncio.run(abort())
    answers = rig.ask(others, selector="everything")
    assert max(a.difference(e) for a, e in zip(answers, expected, strict=True)) < TOLERANCE
    (again,) = rig.ask([prompt], selector="everything")
    assert again.difference(rig.plain(prompt)) < TOLERANCE
    rig.reset()


def test_an_abort_beside_requests_that_go_on(rig):
    prompts = [rig.prompt(200, 100, total=500, seed=place) for place in range(3)]
    expected = [rig.plain(prompt) for prompt in prompts]
    rig.reset()

    async def run():
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=16, temperature=0.0, logprobs=1, ignore_eos=True)

        async def one(prompt, stop):
            stream = rig.llm.stream([int(token) for token in prompt], params, blend={"selector": "everything"})
            async for output in stream:
                if stop and len(output.outputs[0].token_ids) >= 3:
                    break
            await stream.aclose()
            return rig.answer(output)

        return await asyncio.gather(*(one(prompt, place == 1) for place, prompt in enumerate(prompts)))

    answers = asyncio.run(run())
    for place in (0, 2):
        assert answers[place].difference(expected[place]) < TOLERANCE
    rig.reset()


def test_an_interrupted_ingest_goes_on_where_it_stopped(rig):
    words = np.array(["granite", "lighthouse", "ferry", "market", "winter", "quay", "keeper", "museum", "weather"])
    texts = [" ".join(np.random.default_rng(seed).choice(words, 150)) for seed in range(12)]

    async def interrupted():
        ingest = asyncio.ensure_future(rig.llm.kvblend.aingest(texts, progress=False))
        await asyncio.sleep(0.3)
        ingest.cancel()
        await asyncio.gather(ingest, return_exceptions=True)

    asyncio.run(interrupted())
    report = rig.llm.kvblend.ingest(texts, progress=False)
    assert report.computed + report.present == report.chunks == len(texts)
    rig.reset()
    for text in texts[::4]:
        prompt = [*rig.info.context, *rig.engine.tokenizer.encode(text, add_special_tokens=False), *rig.tokens(20, 1)]
        (answer,) = rig.fresh([prompt], selector="none")
        assert answer.report.reused_tokens > 100
        assert answer.difference(rig.plain(prompt)) < TOLERANCE
