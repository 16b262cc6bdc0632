"""What of vLLM's insides we build on, looked at before anything is imported from them.

A vLLM in which one of these is gone or takes other arguments is met with one sentence at start, and not with an
ImportError from the depths, or a wrong call in the middle of a request.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from kvblend_rag.errors import EngineUnavailable
from kvblend_rag.vllm_plugin.versions import served, version

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"

EXPECTED: dict[str, tuple[str, ...]] = {
    "vllm:SamplingParams": ("temperature", "max_tokens", "logprobs", "extra_args"),
    "vllm.config:KVTransferConfig": (
        "kv_connector",
        "kv_connector_module_path",
        "kv_role",
        "kv_connector_extra_config",
    ),
    "vllm.config:VllmConfig": ("model_config", "cache_config", "parallel_config", "scheduler_config"),
    "vllm.engine.arg_utils:AsyncEngineArgs": ("model", "worker_cls", "kv_transfer_config"),
    "vllm.v1.engine.async_llm:AsyncLLM.from_engine_args": ("engine_args",),
    "vllm.v1.engine.async_llm:AsyncLLM.generate": ("prompt", "sampling_params", "request_id"),
    "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc": ("method", "args"),
    "vllm.v1.engine.async_llm:AsyncLLM.reset_prefix_cache": (),
    "vllm.v1.request:Request.update_block_hashes": (),
    "vllm.v1.core.kv_cache_utils:hash_block_tokens": (
        "hash_function",
        "parent_block_hash",
        "curr_block_token_ids",
        "extra_keys",
    ),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
    ),
    f"{_CONNECTOR}.__init__": ("vllm_config", "role", "kv_cache_config"),
    f"{_CONNECTOR}.on_new_request": ("request",),
    f"{_CONNECTOR}.get_num_new_matched_tokens": ("request", "num_computed_tokens"),
    f"{_CONNECTOR}.update_state_after_alloc": ("request", "blocks", "num_external_tokens"),
    f"{_CONNECTOR}.build_connector_meta": ("scheduler_output",),
    f"{_CONNECTOR}.update_connector_output": ("connector_output",),
    f"{_CONNECTOR}.request_finished": ("request", "block_ids"),
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA.request_finished_all_groups": (
        "request",
        "block_ids",
    ),
    f"{_CONNECTOR}.get_handshake_metadata": (),
    f"{_CONNECTOR}.set_xfer_handshake_metadata": ("metadata",),
    f"{_CONNECTOR}.start_load_kv": ("forward_context",),
    f"{_CONNECTOR}.wait_for_save": (),
    f"{_CONNECTOR}.build_connector_worker_meta": (),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__": (
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": ("common_prefix_len", "common_attn_metadata"),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "num_reqs",
        "num_actual_tokens",
        "max_query_len",
        "max_seq_len",
        "block_table_tensor",
        "slot_mapping",
        "causal",
    ),
    "vllm.forward_context:set_forward_context": ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    "vllm.forward_context:get_forward_context": (),
    "vllm.forward_context:ForwardContext": ("no_compile_layers", "slot_mapping"),
    "vllm.model_executor.layers.attention:Attention": (),
    "vllm.model_executor.layers.attention:ChunkedLocalAttention": (),
    "vllm.model_executor.layers.attention:MLAAttention.forward_impl": (),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups",),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": (),
    "vllm.v1.kv_cache_interface:MLAAttentionSpec": (),
    "vllm.v1.kv_cache_interface:SlidingWindowSpec": ("sliding_window",),
}
"""By ``module:name``: parameters that we pass or override, of a class those of its constructor."""


def lacking() -> list[str]:
    """What is not as expected, each in a few words."""
    found = []
    for place, parameters in EXPECTED.items():
        module, _, path = place.partition(":")
        name = f"{module}.{path}"
        try:
            value: Any = importlib.import_module(module)
            for part in path.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError):
            found.append(f"{name} is gone")
            continue
        taken = inspect.signature(value).parameters
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken.values()):
            continue
        found += [f"{name} takes no {each!r}" for each in parameters if each not in taken]
    return found


def expect() -> None:
    """Look; done once a process, when this module is imported.

    Raises:
        EngineUnavailable: vLLM's insides have changed; the sentence names the first of what has, and what to install.
    """
    found = lacking()
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        low, high = served()
        raise EngineUnavailable(
            f"vLLM {version()} is installed, and it has changed: {found[0]}{more}. kvblend-rag works with {low} to "
            f"{high}: pip install 'vllm~={high}.0'."
        )


expect()

__all__ = ["EXPECTED", "expect", "lacking"]
