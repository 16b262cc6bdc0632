"""Dialect: how a model writes tool calls and reasoning, told by its chat template and architecture.

The names are those of vLLM's parsers. The first row whose marks all stand in the template decides; where two
families share their marks, the architecture does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

FALLBACK = "hermes"
"""For templates that know no tools: ``template.ChatTemplate`` describes them in the Hermes style."""


class _Row(NamedTuple):
    parser: str
    marks: tuple[str, ...]
    architecture: str = ""
    """A part of the architecture's name; empty: any."""


_TOOLS = (
    _Row("kimi_k2", ("<|tool_calls_section_begin|>",)),
    _Row("deepseek_v4", ("｜DSML｜",), "DeepseekV4"),
    _Row("deepseek_v32", ("｜DSML｜",)),
    _Row("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    _Row("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    _Row("openai", ("<|channel|>", "commentary")),
    _Row("gemma4", ("<|tool_call>",)),
    _Row("functiongemma", ("<start_function_call>",)),
    _Row("mistral", ("[TOOL_CALLS]",)),
    _Row("llama4_pythonic", ("<|header_start|>",)),
    _Row("llama3_json", ("<|start_header_id|>", "ipython")),
    _Row("minimax_m2", ("<minimax:tool_call>",)),
    _Row("seed_oss", ("<seed:tool_call>",)),
    _Row("longcat", ("<longcat_tool_call>",)),
    _Row("lfm2", ("<|tool_call_start|>",)),
    _Row("step3p5", ("<function=",), "Step3p5"),
    _Row("mimo", ("<function=",), "MiMo"),
    _Row("qwen3_xml", ("<function=",)),
    _Row("glm45", ("<arg_key>",)),
    _Row("olmo3", ("<function_calls>",)),
    _Row("internlm", ("<|action_start|>",)),
    _Row("phi4_mini_json", ("<|tool|>",), "Phi"),
    _Row("granite", ("<|tool_call|>",)),
    _Row("granite4", ("<tool_call>",), "GraniteMoeHybrid"),
    _Row("hunyuan_a13b", ("<tool_calls>",), "HunYuan"),
    _Row("jamba", ("<tool_calls>",), "Jamba"),
    _Row("ernie45", ("<tool_call>",), "Ernie4_5"),
    _Row("hermes", ("<tool_call>",)),
)

_REASONING = (
    _Row("openai_gptoss", ("<|channel|>", "analysis")),
    _Row("gemma4", ("<|channel>",)),
    _Row("mistral", ("[THINK]",)),
    _Row("seed_oss", ("<seed:think>",)),
    _Row("kimi_k2", ("<think>",), "Kimi"),
    _Row("minimax_m2", ("<think>",), "MiniMax"),
    _Row("glm45", ("<think>",), "Glm4"),
    _Row("deepseek_v3", ("<think>", "thinking"), "Deepseek"),
    _Row("hunyuan_a13b", ("<think>",), "HunYuan"),
    _Row("step3p5", ("<think>",), "Step3p5"),
    _Row("mimo", ("<think>",), "MiMo"),
    _Row("nemotron_v3", ("<think>",), "Nemotron"),
    _Row("olmo3", ("<think>",), "Olmo3"),
    _Row("ernie45", ("<think>",), "Ernie4_5"),
    _Row("qwen3", ("<think>", "enable_thinking")),
    _Row("deepseek_r1", ("<think>\\n' }}",)),
    _Row("deepseek_r1", ("<think>\\n'}}",)),
)


def tool_parser(template: str, architectures: Iterable[str] = ()) -> str:
    """The parser of a model's tool calls; ``FALLBACK`` when its template has none of the known marks.

    Args:
        template: the chat template's text.
        architectures: as the model's configuration names them.
    """
    return _first(_TOOLS, template, architectures) or FALLBACK


def reasoning_parser(template: str, architectures: Iterable[str] = ()) -> str:
    """The parser of a model's reasoning; empty when it does not reason aloud. Arguments as above."""
    return _first(_REASONING, template, architectures) or ""


def _first(rows: Iterable[_Row], template: str, architectures: Iterable[str]) -> str | None:
    named = " ".join(architectures)
    for row in rows:
        if row.architecture in named and all(mark in template for mark in row.marks):
            return row.parser
    return None


__all__ = ["FALLBACK", "reasoning_parser", "tool_parser"]
