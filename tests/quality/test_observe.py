"""On the bundled reader: what is measured is the model's own likelihood, over the KV that was asked for."""

import numpy as np
import pytest

from kvblend_rag.demo.prompt import SYSTEM_PROMPT
from kvblend_rag.errors import EngineUnavailable
from kvblend_rag.quality.arms import parse_arms
from kvblend_rag.quality.forcing import distributions, forcing
from kvblend_rag.quality.observe import observe, prepare
from kvblend_rag.quality.prompt import renderer
from kvblend_rag.quality.score import score_all
from kvblend_rag.quality.two_chunk import two_chunk_questions
from kvblend_rag.second_opinion import beginning, disputed


@pytest.fixture(scope="module")
def observed(reader_llm):
    engine = reader_llm.kvblend.engine
    asked = prepare(engine, two_chunk_questions(3, documents=4), renderer(engine, SYSTEM_PROMPT))
    names = ["everything", "reuse", "question:0.3", "question:0.6", "question:0.3:second_opinion=0.6"]
    arms = parse_arms(names, reader_llm.kvblend.config)
    before = reader_llm.kvblend.catalogue.stats()["documents"]
    answers = observe(reader_llm.kvblend, asked, arms, batch=2, progress=False)
    assert reader_llm.kvblend.catalogue.stats()["documents"] == before
    return asked, answers


def test_forced_likelihood_is_that_of_an_ordinary_request(reader_llm, observed):
    import vllm

    asked, answers = observed
    scored = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    for each, seen in zip(asked, answers["plain"], strict=True):
        (output,) = reader_llm.kvblend.engine.run(_raw(reader_llm, [*each.prompt, *each.gold], scored))
        ordinary = output.prompt_logprobs[len(each.prompt) :]
        expected = [step[token].logprob for token, step in zip(each.gold, ordinary, strict=True)]
        assert list(seen.logprobs) == pytest.approx(expected, abs=1e-4)


async def _raw(llm, prompt, sampling):
    """vLLM's own output: ours has no field for prompt log-probabilities."""
    outputs = llm.kvblend.engine._llm.generate({"prompt_token_ids": prompt}, sampling, "scored")
    return [output async for output in outputs if output.finished]


def test_everything_recomputed_is_a_full_prefill_and_reuse_is_not(observed):
    asked, answers = observed
    samples = score_all([each.question for each in asked], answers, answers["plain"])
    for everything, plain, reuse in zip(samples["everything"], samples["plain"], samples["reuse"], strict=True):
        assert everything.blended == 1
        assert everything.same == 1
        assert everything.kl < 1e-6
        assert everything.nll == pytest.approx(plain.nll, abs=1e-4)
        assert reuse.kl > 1e-5
    for sample in samples["question:0.3"]:
        assert 0.2 < sample.recomputed <= 0.3
        assert sample.recomputed * 0.8 < sample.computed < 0.5
        assert 0 < sample.scored < 0.2


def test_what_recomputing_moved_is_what_the_first_tokens_distributions_differ_by(observed):
    _, answers = observed
    for reuse, recomputed in zip(answers["reuse"], answers["question:0.3"], strict=True):
        before, after = (dict(zip(d.tokens, np.exp(d.logprobs), strict=True)) for d in first(reuse, recomputed))
        both = {*before, *after}
        moved = sum(abs(after.get(token, 0.0) - before.get(token, 0.0)) for token in both) / 2
        assert recomputed.signals.moved_mass == pytest.approx(moved, abs=0.01)
        assert reuse.signals.moved_mass is None


def test_a_second_opinion_is_the_answer_at_its_budget(observed):
    _, answers = observed
    pairs = zip(answers["question:0.3"], answers["question:0.6"], strict=True)
    completions = [(low.completion, high.completion) for low, high in pairs]
    expected = [disputed(*pair) for pair in completions]
    signals = [each.signals for each in answers["question:0.3:second_opinion=0.6"]]
    assert [each.disputed for each in signals] == pytest.approx(expected)
    early = [disputed(*map(beginning, pair)) for pair in completions]
    assert [each.disputed_early for each in signals] == pytest.approx(early)
    assert all(each.signals.disputed is None for name in ("plain", "question:0.3") for each in answers[name])
    assert any(each > 1e-4 for each in expected)


def first(*observations):
    return [each.distributions[0] for each in observations]


def test_other_requests_of_the_batch_are_not_forced(reader_llm, observed):
    asked, answers = observed
    engine = reader_llm.kvblend.engine
    greedy = [engine.one_token() for _ in asked]
    forced = [forcing(engine, each.gold) for each in asked]
    prompts = [each.prompt for each in asked]
    outputs = reader_llm.generate([*prompts, *prompts], [*greedy, *forced], blend={"blend": False})
    free, held = outputs[: len(asked)], outputs[len(asked) :]
    for each, output, seen in zip(asked, held, answers["plain"], strict=True):
        logprobs, _ = distributions(output, each.gold)
        assert logprobs == pytest.approx(list(seen.logprobs), abs=1e-4)
    for output, seen in zip(free, answers["plain"], strict=True):
        likeliest = seen.distributions[0]
        assert output.outputs[0].token_ids[0] == likeliest.tokens[likeliest.logprobs.argmax()]


def test_an_engine_that_does_not_force_is_noticed(reader_llm, observed):
    asked, _ = observed
    (output,) = reader_llm.generate([asked[0].prompt], reader_llm.kvblend.engine.one_token(), blend={"blend": False})
    with pytest.raises(EngineUnavailable, match="did not decode"):
        distributions(output, asked[0].gold)
