import dataclasses

import pytest

from kvblend_rag.blend.gate import RequestFacts, refusal


def test_an_ordinary_request_may_be_blended():
    assert refusal(RequestFacts(), model=None, enabled=True, wanted=True) is None


@pytest.mark.parametrize("field", dataclasses.fields(RequestFacts), ids=lambda field: field.name)
def test_every_fact_alone_is_a_reason(field):
    reason = refusal(RequestFacts(**{field.name: not field.default}), model=None, enabled=True, wanted=True)
    assert reason


def test_reasons_differ():
    reasons = {
        refusal(RequestFacts(**{field.name: not field.default}), model=None, enabled=True, wanted=True)
        for field in dataclasses.fields(RequestFacts)
    }
    assert len(reasons) == len(dataclasses.fields(RequestFacts))


def test_the_models_own_reason_comes_first():
    reason = refusal(RequestFacts(lora=True), model="it has state-space layers", enabled=False, wanted=False)
    assert reason == "this model can't be blended: it has state-space layers"


def test_the_switches_say_which_one_it_was():
    assert "enable_blending" in str(refusal(RequestFacts(), model=None, enabled=False, wanted=True))
    assert "asked for" in str(refusal(RequestFacts(), model=None, enabled=True, wanted=False))


def test_a_refusing_verdict_comes_before_the_requests_own_reasons():
    reason = refusal(RequestFacts(lora=True), model=None, enabled=True, wanted=True, verdict="it keeps too little")
    assert reason == "calibration refused this model: it keeps too little"
