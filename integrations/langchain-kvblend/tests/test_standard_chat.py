"""LangChain's standard suites for chat models.

On the real engine, with the bundled reader, for all that does not need a competent model; the tests that do are
answered by a scripted engine, whose output goes through vLLM's own parsers and must keep to the form that vLLM
would have constrained it to. A model of 135 million parameters does not end the strings of a form by itself: that
forms are kept on the real engine is tested in test_reader, with strings that are bounded.

``KVBLEND_TEST_MODEL=path`` runs everything on real weights.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_kvblend import ChatKVBlend
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

NEED_COMPETENCE = (
    "test_agent_loop",
    "test_bind_runnables_as_tools",
    "test_json_mode",
    "test_structured_output",
    "test_structured_output_async",
    "test_structured_output_optional_param",
    "test_structured_output_pydantic_2_v1",
    "test_tool_calling",
    "test_tool_calling_async",
    "test_tool_choice",
    "test_unicode_tool_call_integration",
)


class Abilities:
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVBlend

    @property
    def has_tool_calling(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return True

    @property
    def has_structured_output(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def returns_usage_metadata(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # the model is the engine


class TestUnit(Abilities, ChatModelUnitTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "organisation/model"}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"KVBLEND_MODEL": "from/environment"}, {}, {"model": "from/environment"}


class TestIntegration(Abilities, ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _engine(self, request: pytest.FixtureRequest) -> None:
        scripted = request.node.originalname in NEED_COMPETENCE and not os.environ.get("KVBLEND_TEST_MODEL")
        self._kv = request.getfixturevalue("competent_kv" if scripted else "reader_kv")

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # The reader, a very small model, would call tools until its tokens are used up.
        return {"kv": self._kv, "max_tokens": 48, "parallel_tool_calls": False, "timeout": 600}

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        llm = ChatKVBlend(kv=self._kv, temperature=0, max_tokens=4)
        asked = (
            f"Is the answer {'streamed' if stream else 'whole'}? " + "Think of the machine and its water tank. " * 20
        )
        self._ask(llm, asked, stream)
        again = self._ask(llm, asked, stream)
        assert again.usage_metadata["input_token_details"]["cache_read"] > 100
        return again

    @staticmethod
    def _ask(llm: ChatKVBlend, asked: str, stream: bool) -> Any:
        if not stream:
            return llm.invoke(asked)
        full = None
        for chunk in llm.stream(asked):
            full = chunk if full is None else full + chunk
        return full
