"""PieceGraphs: vLLM's own piecewise CUDA graphs, for scattered forwards of the sizes that it captured.

Between the graphs the attention layers run as always, so that rows and taps are what they are without
graphs; what is saved is launching the kernels of the layers in between, one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor


class PieceGraphs:
    """Finds a captured size, and lends the graphs' input buffers to a forward of ours.

    Args:
        manager: the runner's ``CudaGraphManager``.
        buffers: its ``InputBuffers``.
    """

    def __init__(self, manager: Any, buffers: Any) -> None:
        self._manager, self._buffers = manager, buffers

    @classmethod
    def of(cls, runner: Any) -> PieceGraphs | None:
        """Those of vLLM's V2 runner (vllm/v1/worker/gpu/cudagraph_utils.py); None where they can't be lent."""
        manager, buffers = getattr(runner, "cudagraph_manager", None), getattr(runner, "input_buffers", None)
        if manager is None or buffers is None or manager.use_breakable_cg or runner.lora_config is not None:
            return None
        # A model whose positions have more than one dimension reads them from elsewhere.
        return cls(manager, buffers) if getattr(runner.model_state, "rope_state", None) is None else None

    def size(self, rows: int, tokens: int) -> int | None:
        """The captured number of tokens to fill up to; None when there is no such graph."""
        found = self._manager.dispatch(rows, tokens, None, 0)
        return int(found.num_tokens) if found.cg_mode == CUDAGraphMode.PIECEWISE else None

    @staticmethod
    def context(size: int) -> dict[str, Any]:
        """Arguments of ``set_forward_context`` that have the graphs of a size replayed."""
        return {
            "cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE,
            "batch_descriptor": BatchDescriptor(num_tokens=size),
        }

    @contextmanager
    def inputs(
        self, token_ids: torch.Tensor, positions: torch.Tensor, size: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The graphs' input buffers, (size,) each, filled; what they held is there again afterwards.

        vLLM has put the step in flight there, which runs after us.
        """
        buffers = (self._buffers.input_ids[:size], self._buffers.positions[:size])
        saved = [buffer.clone() for buffer in buffers]
        try:
            for buffer, values in zip(buffers, (token_ids, positions), strict=True):
                buffer[: len(values)] = values
                buffer[len(values) :] = 0
            yield buffers
        finally:
            for buffer, values in zip(buffers, saved, strict=True):
                buffer.copy_(values)


__all__ = ["PieceGraphs"]
