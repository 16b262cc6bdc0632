"""Risk on a real engine: a risky answer becomes the plain one, before anything of it is shown."""

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

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
