"""What vLLM raises for one request reaches the user as one sentence of ours."""

import itertools

import pytest

pytest.importorskip("vllm")

from vllm.v1.engine.exceptions import EngineGenerateError

from kvblend_rag.errors import ConfigError, EngineUnavailable
from kvblend_rag.vllm_plugin.engine import SamplingParams, VLLMEngine


class Failing:
    def __init__(self, cause):
        self._cause = cause

    async def generate(self, *_, **__):
        raise EngineGenerateError from self._cause
        yield


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (
            ValueError("Grammar error: Invalid type: nonsense"),
            ConfigError,
            "does not accept the request: Grammar error",
        ),
        (RuntimeError("out of luck\nand more"), EngineUnavailable, "failed on the request: out of luck$"),
    ],
)
async def test_a_failed_request_is_one_sentence(cause, kind, message):
    engine = VLLMEngine.__new__(VLLMEngine)  # without vLLM's engine, which takes half a minute to start
    engine._llm, engine._ids, engine.info = Failing(cause), itertools.count(), None
    with pytest.raises(kind, match=message):
        await anext(engine._generate([1, 2], SamplingParams(), None, {}))
