"""The planner in a running engine: measured paces, honest reasons, the plain answer where it refuses."""

import numpy as np
import pytest

pytestmark = pytest.mark.full

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama", blocks=40, planner=True)


def test_a_tiny_model_is_prefilled_plainly_and_says_why(rig):
    """Four layers of 128: a hundred tokens are computed in a few milliseconds."""
    prompt = rig.prompt(40, 60, total=130)
    (answer,) = rig.fresh([prompt], selector="question")
    assert not answer.report.blended
    assert "ms" in answer.report.reason
    assert answer.report.reason.startswith(("no chunk could make it faster", "loading the prompt's chunks would"))
    assert answer.difference(rig.plain(prompt)) < TOLERANCE
    assert answer.report.computed_tokens == len(prompt)


def test_asked_for_it_is_blended_all_the_same(rig):
    prompt = rig.prompt(200, 60, 100, total=500)
    (answer,) = rig.fresh([prompt], selector="everything", planner=False)
    assert answer.report.blended
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_everything_recomputed_is_never_found_worth_it(rig):
    """However slow vLLM's three steps of 256 tokens look beside one forward of ours: something else may have run."""
    prompt = rig.prompt(200, 60, 100, 150, total=700)
    (answer,) = rig.fresh([prompt], selector="everything")
    assert not answer.report.blended
    assert answer.report.reason.startswith("no chunk could make it faster")
    assert answer.difference(rig.plain(prompt)) < TOLERANCE


def test_a_batch_of_all_kinds(rig):
    """Blended by wish, refused, unknown and plain, at once: each has its own answer."""
    prompts = [rig.prompt(200, 100, total=400, seed=seed) for seed in range(6)]
    plain = [rig.plain(prompt) for prompt in prompts]
    for options in ({"planner": False, "selector": "everything"}, {"selector": "everything"}, {"blend": False}):
        for answer, expected in zip(rig.fresh(prompts, **options), plain, strict=True):
            assert answer.difference(expected) < TOLERANCE
    foreign = np.concatenate([rig.tokens(300, 9000)])
    (answer,) = rig.fresh([foreign])
    assert answer.difference(rig.plain(foreign)) < TOLERANCE


def test_many_blends_at_once_beside_running_answers_are_all_answered(rig):
    """More than a step may take on: they wait for one another, and none for ever."""
    prompts = [rig.prompt(200, 100, total=420, seed=seed) for seed in range(8)]
    plain = [rig.plain(prompt, 40) for prompt in prompts]
    for _ in range(3):
        answers = rig.fresh(prompts, 40, selector="everything", planner=False)
        for answer, expected in zip(answers, plain, strict=True):
            assert answer.report.blended
            assert answer.difference(expected) < TOLERANCE
