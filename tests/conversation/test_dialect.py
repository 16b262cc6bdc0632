"""Parsers, told by marks in the chat template."""

import pytest

from kvblend_rag.conversation import dialect


@pytest.mark.parametrize(
    ("source", "architecture", "tool", "reasoning"),
    [
        ("<|im_start|>", "LlamaForCausalLM", "hermes", ""),
        ("tools <tool_call>", "Qwen2ForCausalLM", "hermes", ""),
        ("tools <tool_call> <think> enable_thinking", "Qwen3ForCausalLM", "hermes", "qwen3"),
        ("<|start_header_id|> Environment: ipython", "LlamaForCausalLM", "llama3_json", ""),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "MistralForCausalLM", "mistral", ""),
        ("<tool_call> <arg_key> <think>", "Glm4MoeForCausalLM", "glm45", "glm45"),
        ("<|channel|> analysis commentary", "GptOssForCausalLM", "openai", "openai_gptoss"),
        ("<tool_call> <function=", "Qwen3NextForCausalLM", "qwen3_xml", ""),
    ],
)
def test_parsers_are_chosen_from_the_template(source, architecture, tool, reasoning):
    assert dialect.tool_parser(source, [architecture]) == tool
    assert dialect.reasoning_parser(source, [architecture]) == reasoning
