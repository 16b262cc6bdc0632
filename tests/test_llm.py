"""Several answers to one prompt: vLLM shows each when it has got further, and none may be lost."""

import asyncio

from kvblend_rag.llm import _whole
from kvblend_rag.output import CompletionOutput, RequestMetrics, RequestOutput
from kvblend_rag.report import SAME_BLEND, BlendReport

METRICS = RequestMetrics(first_scheduled_time=0.0, first_token_time=1.0, finished_time=2.0)


def shown(*answers, **report):
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=[1],
        outputs=[CompletionOutput(index=index, text=text, token_ids=()) for index, text in answers],
        finished=True,
        metrics=METRICS,
        report=BlendReport(**report),
    )


def whole(*outputs):
    async def stream():
        for output in outputs:
            yield output

    return asyncio.run(_whole(stream()))


def test_answers_are_gathered_in_their_order_as_they_were_shown_last():
    final = whole(shown((1, "b")), shown((0, "a"), (2, "c")), shown((1, "bb")))
    assert [(answer.index, answer.text) for answer in final.outputs] == [(0, "a"), (1, "bb"), (2, "c")]


def test_the_report_is_that_of_the_blend_whose_kv_the_others_found():
    final = whole(shown((1, "b"), blended=True), shown((0, "a"), reason=SAME_BLEND))
    assert final.report.blended
    assert whole(shown((0, "a"), reason=SAME_BLEND)).report.on_blended_kv
    assert not whole(shown((0, "a"), reason="nothing matched")).report.on_blended_kv
