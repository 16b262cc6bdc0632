"""Models that can't be blended run as plain vLLM and say why; nothing of theirs is ever stored."""

import pytest

from kvblend_rag.errors import ConfigError

REFUSED = [
    pytest.param("mistral-sliding", "SlidingWindowSpec, not full attention", id="mistral-sliding"),
    pytest.param("mamba", "state-space layers", id="mamba", marks=pytest.mark.full),
    # A rotary module that is there and not applied to the keys: only the start-up shift test can know.
    pytest.param("cohere2", "don't move with the position", id="cohere2", marks=pytest.mark.full),
    pytest.param("glm", "don't move with the position", id="transformers-backend", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("family", "why"), REFUSED)
def test_a_refused_model_answers_plainly_and_says_why(rigs, family, why):
    rig = rigs.get(family)
    assert why in rig.info.refusal
    with pytest.raises(ConfigError, match="Chunks can't be precomputed for"):
        rig.llm.kvblend.ingest(["A text that is long enough to be a chunk of its own, if only it could be one."] * 2)
    if family == "mamba":
        return  # vLLM starts it on a CPU, and lacks the kernel to run it
    answers = rig.ask([rig.tokens(300, 1), rig.tokens(40, 2)], selector="everything")
    for answer in answers:
        assert len(answer.token_ids) == 16
        assert not answer.report.blended
        assert answer.report.reason == f"this model can't be blended: {rig.info.refusal}"
