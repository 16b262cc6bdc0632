"""Risk on a real engine: a risky answer becomes the plain one, before anything of it is shown."""

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from kvblend_rag.calibration.risk import DEFAULT_RISK
from kvblend_rag.second_opinion import BEGINNING, beginning, disputed

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=24, local_device="disk")


@pytest.fixture
def prompt(rig):
    return rig.prompt(200, 100, total=500, seed=3)


def test_with_a_limit_of_nothing_every_blend_is_computed_in_full(rig, prompt):
    (answer,) = rig.fresh([prompt], max_risk=0.0)
    report = answer.report
    assert not report.blended
    assert 0 < report.risk <= 1
    assert "was above max_risk (0): everything was computed" in report.reason
    assert report.reused_tokens == 0
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_a_blend_in_the_prefix_cache_is_judged_again(rig, prompt):
    rig.fresh([prompt], selector="none")
    (answer,) = rig.ask([prompt], max_risk=0.0, selector="none")
    assert "everything was computed" in answer.report.reason
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_marked_or_below_the_limit_the_blend_is_shown(rig, prompt):
    (blended,) = rig.fresh([prompt], selector="first")
    for options, reason in (({"max_risk": 0.999}, None), ({"max_risk": 0.0, "on_risk": "mark"}, "is above max_risk")):
        (answer,) = rig.fresh([prompt], selector="first", **options)
        assert answer.report.blended
        assert answer.report.risk is not None
        assert (reason or "") in (answer.report.reason or "")
        assert answer.difference(blended) < TOLERANCE


def test_a_second_opinion_is_what_the_larger_budget_answers(rig, prompt):
    """Its part in the risk is that of the two answers, each asked for alone."""
    options = {"selector": "question", "ratio": 0.1}
    asked = SamplingParams(max_tokens=16, temperature=0.0, logprobs=2, ignore_eos=True)
    alone = []
    for ratio in (0.1, 0.6):
        rig.reset()
        (output,) = rig.llm.generate([prompt.tolist()], asked, blend={**options, "ratio": ratio})
        alone.append(output.outputs[0])
    rig.reset()
    (first,) = rig.ask([prompt], max_risk=0.999, second_opinion=0, **options)
    rest = np.log(first.report.risk / (1 - first.report.risk))
    limit = 1 / (1 + np.exp(-rest))  # a second opinion turns it, whichever way
    (answer,) = rig.fresh([prompt], max_risk=float(limit), on_risk="mark", second_opinion=0.6, **options)
    weight, typical = DEFAULT_RISK.answer.weights["disputed"], DEFAULT_RISK.answer.typical["disputed"]
    found = (np.log(answer.report.risk / (1 - answer.report.risk)) - rest) / weight + typical
    assert found == pytest.approx(disputed(*alone), abs=1e-3)
    assert answer.token_ids == first.token_ids
    assert ("is above max_risk" in (answer.report.reason or "")) == (found > typical)


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_a_second_opinion_on_a_stream_is_how_the_larger_budget_begins(rig, prompt, kind):
    options = {"selector": "question", "ratio": 0.1}
    length = BEGINNING + 8
    alone = []
    for ratio, tokens in ((0.1, length), (0.6, BEGINNING)):
        asked = SamplingParams(max_tokens=tokens, temperature=0.0, logprobs=2, ignore_eos=True)
        rig.reset()
        (output,) = rig.llm.generate([prompt.tolist()], asked, blend={**options, "ratio": ratio})
        alone.append(output.outputs[0])

    def streamed(**guarded):
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, output_kind=kind)

        async def gathered():
            stream = rig.llm.kvblend.stream(prompt.tolist(), params, blend={**options, **guarded})
            return [each async for each in stream]

        rig.reset()
        return rig.llm.kvblend.engine.run(gathered())

    risk = streamed(max_risk=0.999, second_opinion=0)[0].report.risk
    rest = np.log(risk / (1 - risk))
    shown = streamed(max_risk=risk, on_risk="mark", second_opinion=0.6, second_opinion_streams=True)
    weight, typical = DEFAULT_RISK.first.weights["disputed_early"], DEFAULT_RISK.first.typical["disputed_early"]
    found = (np.log(shown[0].report.risk / (1 - shown[0].report.risk)) - rest) / weight + typical
    assert found == pytest.approx(disputed(beginning(alone[0]), alone[1]), abs=1e-3)
    parts = [each.outputs[0].token_ids for each in shown]
    tokens = sum(parts, ()) if kind == RequestOutputKind.DELTA else parts[-1]
    assert tokens == alone[0].token_ids


def moved(rig, prompt, **options):
    (answer,) = rig.fresh([prompt], count=2, **{"selector": "question", "ratio": 0.5, "max_risk": 0.999, **options})
    assert answer.report.blended
    return answer.report.moved_mass


def test_where_what_is_loaded_is_exact_recomputing_moves_nothing(rig):
    """A chunk right behind the ingest context, as it was computed."""
    chunk = rig.chunks[200]
    assert moved(rig, np.concatenate([rig.info.context, chunk, rig.tokens(40, 5)])) < 1e-5


def test_without_recomputing_nothing_moves_and_with_more_of_it_more(rig, prompt):
    shares = [moved(rig, prompt, ratio=ratio) for ratio in (0.0, 0.1, 0.9)]
    assert shares[0] < 1e-5 < shares[1] < shares[2] <= 1


def test_between_swapped_chunks_much_moves(rig):
    """Their files are sound, and each holds the other's KV."""
    chunks = [rig.tokens(150, 70 + number) for number in range(2)]
    rig.store(*chunks)
    asked = np.concatenate([rig.info.context, chunks[0], rig.tokens(1, 7), chunks[1], rig.tokens(40, 5)])
    sound = moved(rig, asked)
    stored = [rig.stored(chunk) for chunk in chunks]
    for chunk, kv in zip(chunks, reversed(stored), strict=True):
        rig.rewrite(chunk, kv)
    swapped = moved(rig, asked)
    for chunk, kv in zip(chunks, stored, strict=True):
        rig.rewrite(chunk, kv)
    assert swapped > 3 * sound
    assert moved(rig, asked) == pytest.approx(sound, abs=1e-6)


@pytest.mark.parametrize("layers", ["later", "middle"])
def test_comparing_changes_neither_the_choice_nor_the_answer(rig, prompt, layers):
    options = {"selector": "question", "ratio": 0.3, "layers": layers}
    (alone,), (watched,) = rig.fresh([prompt], **options), rig.fresh([prompt], max_risk=0.999, **options)
    assert alone.report.moved_mass is None
    assert 0 < watched.report.moved_mass < 1
    assert watched.report.recomputed_spans == alone.report.recomputed_spans
    assert watched.difference(alone) < TOLERANCE


def test_selectors_that_ask_nothing_compare_nothing(rig, prompt):
    assert all(moved(rig, prompt, selector=selector) is None for selector in ("none", "first", "deviation"))


def test_a_plain_request_has_no_risk(rig):
    (answer,) = rig.fresh([rig.tokens(300, 77)], max_risk=0.0)
    assert answer.report.risk is None
    assert "stands in the prompt" in answer.report.reason


def test_log_probabilities_are_those_asked_for(rig, prompt):
    for asked in (None, 0, 1, 3):
        (plain, guarded) = (
            rig.llm.generate(
                [prompt.tolist()],
                SamplingParams(max_tokens=3, temperature=0.0, logprobs=asked, ignore_eos=True),
                blend=b,
            )[0].outputs[0]
            for b in ({"selector": "first"}, {"selector": "first", "max_risk": 0.999})
        )
        if asked is None:
            assert guarded.logprobs is None
        else:
            assert [set(step) for step in guarded.logprobs] == [set(step) for step in plain.logprobs]
            assert np.isclose(guarded.cumulative_logprob, plain.cumulative_logprob)


def test_several_answers_of_one_prompt(rig, prompt):
    params = SamplingParams(max_tokens=3, n=2, temperature=1.0, output_kind=RequestOutputKind.FINAL_ONLY)
    (output,) = rig.llm.generate([prompt.tolist()], params, blend={"max_risk": 0.0, "selector": "first"})
    assert len(output.outputs) == 2
    assert "everything was computed" in output.report.reason
