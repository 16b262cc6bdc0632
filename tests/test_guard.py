"""A risky answer is computed in full before anything of it is shown, or marked; on the scripted engine."""

import asyncio
import contextlib

import pytest

from kvblend_rag.blend.chunk import namespace
from kvblend_rag.calibration.risk import Logistic, RiskModel
from kvblend_rag.calibration.verdict import Verdict, write_verdict
from kvblend_rag.chat import Chat
from kvblend_rag.conversation.sampling import Sampling
from kvblend_rag.errors import ConfigError
from kvblend_rag.llm import LLM
from kvblend_rag.report import BlendReport
from kvblend_rag.second_opinion import BEGINNING
from kvblend_rag.testing import fake_kvblend
from kvblend_rag.testing.script import FakeParams

DOCUMENT = "The ferry to the northern island leaves at seven in the morning and returns at noon, except on Sundays. "
PROMPT = f"{DOCUMENT} When does it leave?"
# Doubt of the first token, and nothing else; −0.1 nats is a sure token, −2 nats an unsure one.
DOUBT = Logistic(0.0, {"doubt": 8.0}, {"doubt": 0.5})
MODEL = RiskModel(DOUBT, Logistic(0.0, {"weakest": 8.0}, {"weakest": 0.5}))
# What a second opinion says, and nothing else; of a stream, nothing.
DISPUTE = RiskModel(DOUBT, Logistic(-4.0, {"disputed": 8.0}, {"disputed": 0.0}))
# The same of its first tokens.
EARLY = RiskModel(Logistic(-4.0, {"disputed_early": 8.0}, {"disputed_early": 0.0}), DISPUTE.answer)
LONG = "Blended words of an answer that goes on and on for as long as anybody may care to listen to it."


def answered(request):
    return "In full." if request.options.get("blend") is False else "Blended words here."


@pytest.fixture
def make(tmp_path):
    handles = []

    def make(logprob, *, answers=answered, risk=MODEL, delay=0.0, **config):
        settings = {"max_risk": 0.5, **config}
        kv = fake_kvblend(answers, store_path=tmp_path, logprob=logprob, delay=delay, config=settings)
        info = kv.engine.info
        write_verdict(
            Verdict(
                status="accepted",
                reason="good",
                model=info.model,
                fingerprint=info.fingerprint,
                context="document",
                context_digest=namespace(info.fingerprint, info.context),
                risk=risk,
            ),
            tmp_path,
        )
        kv.ingest([DOCUMENT], progress=False)
        handles.append(kv)
        return kv

    yield make
    for kv in handles:
        kv.close()


def outputs(kv, prompt=PROMPT, kind="cumulative", **blend):
    async def gathered():
        return [each async for each in kv.stream(prompt, FakeParams(kind=kind), blend=blend)]

    return kv.engine.run(gathered())


def text_of(shown, kind):
    return "".join(each.outputs[0].text for each in shown) if kind == "delta" else shown[-1].outputs[0].text


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_a_sure_answer_is_shown_as_it_is(make, kind):
    kv = make(-0.1)
    shown = outputs(kv, kind=kind)
    assert text_of(shown, kind) == "Blended words here."
    assert shown[-1].report.blended
    assert shown[-1].report.reason is None
    assert shown[-1].report.risk < 0.5
    assert len(kv.engine.requests) == 1


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_of_a_risky_one_nothing_is_shown(make, kind):
    kv = make(-2.0)
    shown = outputs(kv, kind=kind)
    assert not any("Blended" in each.outputs[0].text for each in shown)
    assert text_of(shown, kind) == "In full."
    report = shown[-1].report
    assert not report.blended
    assert report.risk > 0.5
    assert "was above max_risk (0.5): everything was computed" in report.reason
    assert [request.options.get("blend") for request in kv.engine.requests] == [None, False]
    assert len(kv.engine.aborted) == (kind != "final")
    assert shown[-1].metrics.ttft > 0
    assert shown[-1].metrics.first_scheduled_time <= shown[0].metrics.first_token_time


def test_a_risky_one_may_be_marked_instead(make):
    shown = outputs(make(-2.0), on_risk="mark")
    assert shown[-1].outputs[0].text == "Blended words here."
    assert shown[-1].report.blended
    assert "is above max_risk (0.5)" in shown[-1].report.reason


def test_a_prompt_without_chunks_has_no_risk(make):
    kv = make(-2.0)
    (last,) = outputs(kv, "Something else altogether, of no document at all.", kind="final")
    assert last.report.risk is None
    assert len(kv.engine.requests) == 1


def test_a_blend_met_again_in_the_prefix_cache_is_judged_again(make):
    kv = make(-2.0)
    assert outputs(kv)[-1].report.risk > 0.5
    shelf = kv.engine._shelf
    shelf.report = lambda request_id, prompt, options: _cached(shelf, request_id, prompt)
    assert "everything was computed" in outputs(kv)[-1].report.reason


def _cached(shelf, request_id, prompt):
    shelf._accounts[request_id] = {"uncovered": 0.5, "moved": None}
    return BlendReport(request_id=request_id, prompt_tokens=len(prompt), cached_tokens=len(prompt) - 1)


def test_without_a_limit_nothing_is_asked_for(make):
    kv = make(-2.0, max_risk=1.0)
    shown = outputs(kv)
    assert shown[-1].report.risk is None
    assert not kv.engine.requests[0].params.settings.logprobs
    assert not any(method == "account" for method, _ in kv.engine.calls)


def test_log_probabilities_come_only_where_they_were_asked_for(make):
    kv = make(-0.1)
    assert outputs(kv)[-1].outputs[0].logprobs is None
    params = FakeParams(settings=Sampling(logprobs=True, top_logprobs=1))

    async def last():
        return [each async for each in kv.stream(PROMPT, params)][-1]

    assert len(kv.engine.run(last()).outputs[0].logprobs) == 4


def of_two_minds(request):
    return answered(request) if request.options.get("ratio") != 0.4 else "Blended but otherwise."


def ratios(kv):
    return [(request.options.get("ratio"), request.options.get("blend")) for request in kv.engine.requests]


def test_a_second_opinion_that_agrees_lets_the_answer_pass(make):
    kv = make(-2.0, risk=DISPUTE, second_opinion=0.4)
    (shown,) = outputs(kv, kind="final")
    assert shown.outputs[0].text == "Blended words here."
    assert shown.report.risk == pytest.approx(0.018, abs=1e-3)
    assert ratios(kv) == [(None, None), (0.4, None)]


def test_a_second_opinion_that_disputes_it_has_everything_computed(make):
    kv = make(-0.01, answers=of_two_minds, risk=DISPUTE, second_opinion=0.4)
    (shown,) = outputs(kv, kind="final")
    assert shown.outputs[0].text == "In full."
    assert shown.report.risk > 0.9
    assert ratios(kv) == [(None, None), (0.4, None), (None, False)]


def test_who_waits_for_the_whole_answer_has_all_of_it_judged(make):
    """Of ``LLM.generate``, as vLLM's own, the outputs in between are nobody's."""
    kv = make(-0.01, answers=of_two_minds, risk=DISPUTE, second_opinion=0.4)
    (answer,) = LLM.from_engine(kv.engine, kv.config).generate(PROMPT, FakeParams(kind="cumulative"))
    assert answer.outputs[0].text == "In full."
    assert [ratio for ratio, _ in ratios(kv)] == [None, 0.4, None]


def at_length(second):
    """An answer of many tokens, and another that a second opinion gives."""

    def answers(request):
        if request.options.get("blend") is False:
            return "In full."
        return second if request.options.get("ratio") == 0.4 else LONG

    return answers


def opined(make, answers, risk=EARLY, **more):
    """An engine whose streams, too, are held back for a second opinion."""
    return make(-0.1, answers=answers, risk=risk, second_opinion=0.4, second_opinion_streams=True, **more)


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
def test_a_stream_goes_on_where_a_second_opinion_begins_as_it_does(make, kind):
    kv = opined(make, at_length(LONG[:60] + " but ends otherwise."))
    shown = outputs(kv, kind=kind)
    alone = outputs(kv, kind=kind, max_risk=1.0)
    assert [each.outputs[0].text for each in shown] == [each.outputs[0].text for each in alone]
    assert text_of(shown, kind) == LONG
    assert shown[0].report.risk == pytest.approx(0.018, abs=1e-3)
    (first, second), *_ = zip(kv.engine.requests, kv.engine.requests[1:], strict=False)
    assert (first.options.get("ratio"), second.options.get("ratio")) == (None, 0.4)
    assert (second.params.kind, second.params.settings.max_tokens) == ("final", BEGINNING)


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
def test_nothing_is_shown_of_a_stream_whose_beginning_is_disputed(make, kind):
    kv = opined(make, at_length("Blended but otherwise, and at some length besides."))
    shown = outputs(kv, kind=kind)
    assert text_of(shown, kind) == "In full."
    assert not any("Blended" in each.outputs[0].text for each in shown)
    assert ratios(kv) == [(None, None), (0.4, None), (None, False)]
    assert shown[-1].report.risk > 0.5


@pytest.mark.parametrize("kind", ["cumulative", "delta"])
@pytest.mark.parametrize(("second", "text"), [(answered, "Blended words here."), (of_two_minds, "In full.")])
def test_a_stream_that_ends_before_is_judged_as_a_whole(make, kind, second, text):
    kv = opined(make, second)
    shown = outputs(kv, kind=kind)
    assert text_of(shown, kind) == text
    assert (shown[-1].report.risk > 0.9) == (text == "In full.")
    assert kv.engine.requests[1].params.kind == "final"
    assert kv.engine.requests[1].params.settings.max_tokens == kv.engine.requests[0].params.settings.max_tokens


def test_a_disputed_stream_may_be_marked_instead(make):
    kv = opined(make, at_length("Blended but otherwise, and at some length."))
    shown = outputs(kv, kind="delta", on_risk="mark")
    assert text_of(shown, "delta") == LONG
    assert shown[0].report.risk > 0.5


@pytest.mark.parametrize(("kind", "risk"), [("delta", EARLY), ("cumulative", EARLY), ("final", DISPUTE)])
def test_time_to_first_token_counts_what_an_answer_was_held_back(make, kind, risk):
    kv = opined(make, at_length(LONG), risk=risk, delay=0.01)
    metrics = outputs(kv, kind=kind)[-1].metrics
    assert len(kv.engine.requests) == 2
    assert metrics.ttft > 2 * BEGINNING * 0.01  # where the first token alone takes 0.01
    assert metrics.finished_time >= metrics.first_token_time


def test_leaving_a_stream_that_is_held_back_aborts_both(make):
    kv = opined(make, at_length(LONG), delay=0.02)

    async def leave():
        waiting = asyncio.ensure_future(anext(kv.stream(PROMPT, FakeParams(kind="delta"))))
        while len(kv.engine.requests) < 2:
            await asyncio.sleep(0.005)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.1)

    kv.engine.run(leave())
    assert len(kv.engine.aborted) == 2


def test_a_second_opinion_may_mark_the_answer_instead(make):
    (shown,) = outputs(
        make(-0.01, answers=of_two_minds, risk=DISPUTE, second_opinion=0.4), kind="final", on_risk="mark"
    )
    assert shown.outputs[0].text == "Blended words here."
    assert "is above max_risk (0.5)" in shown.report.reason


@pytest.mark.parametrize(
    ("kind", "risk", "blend"),
    [
        ("cumulative", DISPUTE, {"second_opinion_streams": True}),  # of a stream it says nothing
        ("cumulative", EARLY, {}),  # it is not held back for that
        ("final", MODEL, {}),  # whatever it says, the risk is the same
        ("final", DISPUTE, {"second_opinion": 0.1}),  # less than the first
        ("final", DISPUTE, {"selector": "none"}),  # no budget at all
        ("final", DISPUTE, {"max_risk": 0.99}),  # above the limit it can't come
    ],
)
def test_no_second_opinion_where_it_could_change_nothing(make, kind, risk, blend):
    kv = make(-0.1, risk=risk, second_opinion=0.4)
    assert outputs(kv, kind=kind, **blend)[-1].outputs[0].text == "Blended words here."
    assert len(kv.engine.requests) == 1


@pytest.mark.parametrize("kind", ["cumulative", "delta", "final"])
def test_several_answers_of_a_prompt_have_no_second_opinion(make, kind):
    """Of a stream, each part may be another's."""
    kv = opined(make, answered)

    async def gathered():
        return [each async for each in kv.stream(PROMPT, FakeParams(settings=Sampling(n=2), kind=kind))]

    assert kv.engine.run(gathered())[-1].finished
    assert len(kv.engine.requests) == 1


def test_chat_is_guarded_too(make):
    kv = make(-2.0)
    talker = Chat(kv)
    asked = [{"role": "user", "content": PROMPT}]
    assert talker.complete_sync(asked).text == "In full."
    kv.engine.run(kv.engine.reset_prefix_cache())
    assert "".join(delta.text for delta in talker.stream_sync(asked)) == "In full."


def test_leaving_early_aborts(make):
    kv = make(-0.1)

    async def leave():
        outputs = kv.stream(PROMPT, FakeParams())
        await anext(outputs)
        await outputs.aclose()
        await asyncio.sleep(0.05)

    kv.engine.run(leave())
    assert len(kv.engine.aborted) == 1


def test_a_wrong_limit(make):
    with pytest.raises(ConfigError, match="max_risk is 2"):
        outputs(make(-0.1), max_risk=2)
