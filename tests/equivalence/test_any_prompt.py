"""Everything recomputed is plain vLLM, whatever the prompt is made of: hypothesis looks for a counterexample."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

TOLERANCE = 1e-4

part = st.one_of(
    st.tuples(st.just("chunk"), st.sampled_from((40, 60, 100, 150, 200)), st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.just("other"), st.integers(1, 90), st.integers(0, 5)),
)


@pytest.fixture(scope="module")
def rig(rigs):
    return rigs.get("llama")


def made(rig, parts, question):
    """Chunks, whole or cut at either end, once or again, next to one another or not, and a question."""
    tokens = [rig.tokens(1, 7)]
    for kind, size, *rest in parts:
        if kind == "chunk":
            first, last = rest
            tokens.append(rig.chunks[size][first : size - last])
        else:
            tokens.append(rig.tokens(size, 300 + rest[0]))
    return np.concatenate([*tokens, rig.tokens(question, 400)])[:1400]


prompts = st.lists(st.tuples(st.lists(part, min_size=1, max_size=7), st.integers(1, 60)), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts, st.sampled_from(("everything", "first", "question", "deviation")), st.booleans())
def test_everything_recomputed_is_plain(rig, given_prompts, selector, cached):
    asked = [made(rig, parts, question) for parts, question in given_prompts]
    plain = [rig.plain(each, count=4) for each in asked]
    rig.reset()
    if cached:
        rig.ask([asked[0][: len(asked[0]) // 2]], count=1, blend=False)
    answers = rig.ask(asked, count=4, selector=selector, ratio=1.0)
    for answer, expected in zip(answers, plain, strict=True):
        assert answer.report.reused_tokens == 0
        assert answer.difference(expected) < TOLERANCE
