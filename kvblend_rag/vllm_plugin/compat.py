"""Every difference between vLLM versions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kvblend_rag.vllm_plugin import expected  # noqa: F401  first, since it says what others would trip over

# isort: split
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvblend_rag.vllm_plugin.versions import unsupported_version, version


def platform_worker() -> type[Any]:
    """The worker class that vLLM would use on this platform by itself."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def find_connector(kind: type[Any]) -> Any | None:
    """This process's connector of the given class, also inside a MultiConnector."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if not has_kv_transfer_group():
        return None
    group = get_kv_transfer_group()
    candidates: Iterable[Any] = [group, *getattr(group, "_connectors", ())]
    return next((connector for connector in candidates if isinstance(connector, kind)), None)


def writes_blocks(scheduler_output: Any) -> bool:
    """Whether vLLM zeroes or copies KV blocks of its own before a step; what is blended must come after."""
    names = ("new_block_ids_to_zero", "kv_cache_block_copies")  # the second since 0.26
    return any(getattr(scheduler_output, name, None) for name in names)


def private_builder(group: Any, vllm_config: VllmConfig, device: torch.device) -> Any:
    """A metadata builder of our own for an attention group.

    The engine's builders keep state of the step in flight (vllm/v1/attention/backends/*), so ours must
    not share them.
    """
    theirs = group.metadata_builders[0]
    extra = {}
    if getattr(type(theirs), "requires_block_table_width", False):  # 0.32
        spec = group.kv_cache_spec
        blocks = spec.max_num_blocks_per_req(vllm_config, vllm_config.model_config.max_model_len)
        extra["block_table_width"] = blocks * spec.block_size // theirs.kv_cache_spec.block_size
    return type(theirs)(theirs.kv_cache_spec, group.layer_names, vllm_config, device, **extra)


def confuses_windows(runner: Any) -> bool:
    """Whether a group of layers with different windows is scheduled as if all had one: on a CPU until 0.32.

    Beside a connector vLLM puts all of them into one group, and its builder takes the spec's window for everyone's
    (vllm/v1/attention/backends/cpu_attn.py, ``_group_sliding_window``, is the repair).
    """
    modules = runner.vllm_config.compilation_config.static_forward_context
    for group in (group for groups in runner.attn_groups for group in groups):
        builder = group.metadata_builders[0]
        if hasattr(builder, "_group_sliding_window") or getattr(builder, "window_size", None) in (None, -1):
            continue
        if len({getattr(modules[name].impl, "sliding_window", None) for name in group.layer_names}) > 1:
            return True
    return False


def common_metadata(**fields: Any) -> CommonAttentionMetadata:
    """A CommonAttentionMetadata of those fields that the installed version has."""
    known = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    fields["_seq_lens_cpu"] = fields["seq_lens_cpu_upper_bound"]  # 0.26 only; FlashInfer syncs without it
    return CommonAttentionMetadata(**{name: value for name, value in fields.items() if name in known})


@contextmanager
def without_adapters(runner: Any, tokens: int) -> Iterator[None]:
    """The base model alone inside, for so many tokens, where LoRA is enabled; then as the running step had it."""
    if not hasattr(runner, "lora_manager"):
        yield
        return
    from vllm.lora.layers import LoRAMapping

    manager = runner.lora_manager._adapter_manager
    running = manager._last_mapping
    manager.set_adapter_mapping(LoRAMapping((0,) * tokens, (0,), is_prefill=True))
    try:
        yield
    finally:
        if running is not None:
            manager.set_adapter_mapping(running)


def keep_first_runner() -> None:
    """Have vLLM use Model Runner V1: V2 takes no logits processors in 0.26, and later of another kind."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def configure_logging(arguments: Any) -> None:
    """Have vLLM's log options take effect, where a server's arguments have such: since 0.32."""
    from vllm import logger

    configure = getattr(logger, "configure_logging_from_args", None)
    if configure is not None:
        configure(arguments)


def chat_request(**fields: Any) -> Any:
    """vLLM's ``ChatCompletionRequest``, which its parsers read; it wants no ``tool_choice`` without tools."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    if fields.get("tools") is None:
        fields = {name: value for name, value in fields.items() if name not in ("tools", "tool_choice")}
    return ChatCompletionRequest(**fields)


def show_prompt(parser: Any, prompt: list[int]) -> None:
    """Tell a chat parser the prompt, where it can be told: since 0.27."""
    if hasattr(parser, "set_prompt_token_ids"):
        parser.set_prompt_token_ids(prompt)


__all__ = [
    "chat_request",
    "common_metadata",
    "configure_logging",
    "confuses_windows",
    "find_connector",
    "keep_first_runner",
    "platform_worker",
    "private_builder",
    "show_prompt",
    "unsupported_version",
    "version",
    "without_adapters",
    "writes_blocks",
]
