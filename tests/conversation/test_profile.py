"""Profiles of models that are not loaded."""

import json

from kvblend_rag.config import BlendConfig
from kvblend_rag.conversation.profile import profile_of


def test_profile_of_a_folder(tmp_path):
    described = {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 2048}
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert profile_of(BlendConfig(model=str(tmp_path))).tool_calling is False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ tools }}"}))
    profile = profile_of(BlendConfig(model=str(tmp_path)))
    assert (profile.max_input_tokens, profile.tool_calling, profile.native_tools) == (2048, True, True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}<think> enable_thinking")
    profile = profile_of(BlendConfig(model=str(tmp_path), engine_args={"max_model_len": 512}))
    assert (profile.max_input_tokens, profile.reasoning_output, profile.native_tools) == (512, True, False)
    assert profile_of(BlendConfig(model="org/name")) is None
    assert profile_of(BlendConfig()) is None
