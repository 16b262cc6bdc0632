"""The scattered forward: vLLM's own model over any ranges of a request's tokens.

Every contiguous range is shown to the attention backend as a sequence of its own: the request's block
table, ``query_len`` the range's length, ``seq_len`` its end. The causal mask is then right for every
token on every backend, because it *is* vLLM's forward (vllm/v1/attention/backend.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import set_forward_context

from kvblend_rag.blend.chunk import TokenIds
from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.worker.paged_kv import BlockIds, PagedKV
from kvblend_rag.vllm_plugin.worker.piece_graphs import PieceGraphs


@dataclass(frozen=True)
class Row:
    """Positions ``[start, stop)`` of one request, one sequence to the attention backend."""

    token_ids: TokenIds
    block_ids: BlockIds
    start: int
    stop: int


class ScatteredForward:
    """Runs rows through the model, writing their KV into the paged cache; hidden states are dropped, but for one."""

    def __init__(self, runner: Any, paged: PagedKV) -> None:
        self._runner, self._paged = runner, paged
        self._config = runner.vllm_config
        self._groups = [group for groups in runner.attn_groups for group in groups]
        self._builders = [compat.private_builder(group, self._config, paged.device) for group in self._groups]
        scheduler = self._config.scheduler_config
        # The compiled model asserts beyond the first; FlashInfer and others keep buffers of the second.
        self.max_tokens = int(scheduler.max_num_batched_tokens)
        self.max_rows = int(scheduler.max_num_seqs)
        model = runner.model_config
        # Such a model is compiled with embeddings as its input, even for text alone.
        self._embeds = bool(runner.supports_mm_inputs or model.enable_prompt_embeds)
        self._position_rows = 3 if model.uses_mrope else 1
        # Their buffers hold token ids and one row of positions, and were captured with adapters' kernels or without.
        self._graphs = not self._embeds and self._position_rows == 1 and self._config.lora_config is None

    @property
    def model(self) -> Any:
        """As vLLM loaded it."""
        return self._runner.get_model()

    @torch.inference_mode()
    def run(
        self,
        rows: Iterable[Row],
        around: AbstractContextManager[Any] | None = None,
        position_offset: int = 0,
        see_last: Callable[[torch.Tensor], None] | None = None,
        begin: Callable[[npt.NDArray[np.int64]], None] | None = None,
    ) -> TokenIds:
        """Compute the rows, in position order where they don't fit into one forward.

        Args:
            rows: of one request in ascending order; of several, parents before those that share blocks.
            around: entered inside the forward context, to look into the layers.
            position_offset: added to the positions that the rotary embedding sees, and to nothing else.
            see_last: called after each forward with the hidden state of its furthest position, (hidden_size,).
            begin: called before each forward with its positions, (tokens,) in the order in which they go through.

        Returns:
            The positions in the order in which they went through the model.
        """
        done: list[Row] = []
        for batch in self._batches(rows):
            # Backends take a leading run of single-token rows as decodes, so these come first. Of the others the
            # longest do: the last to start is what a GPU waits for when all else is done.
            batch.sort(key=lambda row: (row.stop - row.start > 1, -row.stop))
            if begin is not None:
                begin(np.concatenate([np.arange(row.start, row.stop) for row in batch]))
            states = self._run_batch(batch, around or nullcontext(), position_offset)
            if see_last is not None:
                furthest = max(range(len(batch)), key=lambda index: batch[index].stop)
                # A CUDA graph's output is overwritten by the next replay.
                see_last(states[sum(row.stop - row.start for row in batch[: furthest + 1]) - 1].clone())
            done.extend(batch)
        return np.concatenate(
            [np.arange(row.start, row.stop, dtype=np.int32) for row in done] or [np.zeros(0, np.int32)]
        )

    @property
    def tells_next_token(self) -> bool:
        """Whether ``next_token`` can be asked: an output layer with adapters depends on the step in flight."""
        return self._config.lora_config is None

    @torch.inference_mode()
    def next_token(self, state: torch.Tensor) -> torch.Tensor | None:
        """(vocabulary,) float32, the probabilities behind a hidden state; every rank must ask, and some get None."""
        logits = self._runner.model.compute_logits(state[None])
        return None if logits is None else logits[0].float().softmax(dim=-1)

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        batch: list[Row] = []
        room = self.max_tokens
        for row in rows:
            start = row.start
            while start < row.stop:
                if room == 0 or len(batch) == self.max_rows:
                    yield batch
                    batch, room = [], self.max_tokens
                stop = min(row.stop, start + room)
                batch.append(Row(row.token_ids, row.block_ids, start, stop))
                room -= stop - start
                start = stop
        if batch:
            yield batch

    def _run_batch(self, rows: list[Row], around: AbstractContextManager[Any], position_offset: int) -> Any:
        upload = self._paged.upload
        lengths = np.array([row.stop - row.start for row in rows])
        ends = np.array([row.stop for row in rows], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        positions = torch.from_numpy(np.concatenate([np.arange(row.start, row.stop) for row in rows]))
        token_ids = np.concatenate([row.token_ids[row.start : row.stop] for row in rows])
        slot_mapping = upload(self._slots(rows, offsets, positions))
        seq_lens_cpu = torch.from_numpy(ends)
        offsets_cpu = torch.from_numpy(offsets)
        positions = upload(positions + position_offset)
        common = {
            "query_start_loc": upload(offsets_cpu),
            "query_start_loc_cpu": offsets_cpu,
            "seq_lens": upload(seq_lens_cpu),
            "seq_lens_cpu_upper_bound": seq_lens_cpu,
            "num_reqs": len(rows),
            "num_actual_tokens": len(token_ids),
            "max_query_len": int(lengths.max()),
            "max_seq_len": int(ends.max()),
            "slot_mapping": slot_mapping,
            "causal": True,
            "positions": positions,
            "is_prefilling": torch.ones(len(rows), dtype=torch.bool),
        }
        metadata: dict[str, Any] = {}
        for group, builder in zip(self._groups, self._builders, strict=True):
            table = self._block_table(rows, builder.kv_cache_spec.block_size)
            built = builder.build(0, compat.common_metadata(block_table_tensor=table, **common))
            metadata.update(dict.fromkeys(group.layer_names, built))
        # int32: with int64 the compiled model returns wrong values and no error.
        ids = upload(torch.from_numpy(token_ids.astype(np.int32)))
        graphs = PieceGraphs.of(self._runner) if self._graphs else None
        size = graphs.size(len(rows), len(token_ids)) if graphs is not None else None
        replayed: dict[str, Any] = {}
        inputs: AbstractContextManager[Any] = nullcontext((ids, positions))
        if graphs is not None and size is not None:
            replayed, inputs = graphs.context(size), graphs.inputs(ids, positions, size)
        with (
            set_forward_context(
                metadata,
                self._config,
                num_tokens=size or len(token_ids),
                slot_mapping=dict.fromkeys(metadata, slot_mapping),
                **replayed,
            ),
            inputs as (input_ids, rotary_positions),
            compat.without_adapters(self._runner, len(token_ids)),
            around,
        ):
            return self._runner.model(
                **self._token_inputs(input_ids), positions=self._rotary(rotary_positions), intermediate_tensors=None
            )
        return None  # a tap has ended the forward

    def _token_inputs(self, ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
        if not self._embeds:
            return {"input_ids": ids, "inputs_embeds": None}
        raw = ids if getattr(self.model, "requires_raw_input_tokens", False) else None
        return {"input_ids": raw, "inputs_embeds": self.model.embed_input_ids(ids)}

    def _rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """M-RoPE's three rows are one and the same where there is text alone."""
        return positions if self._position_rows == 1 else positions.expand(self._position_rows, -1).contiguous()

    def _slots(self, rows: list[Row], offsets: Any, positions: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64 on the host; rows of one request, which follow one another, in one go."""
        parts = []
        first = 0
        for last, row in enumerate(rows):
            if last + 1 == len(rows) or rows[last + 1].block_ids is not row.block_ids:
                parts.append(self._paged.host_slots(row.block_ids, positions[offsets[first] : offsets[last + 1]]))
                first = last + 1
        return torch.cat(parts)

    def _block_table(self, rows: list[Row], kernel_block_size: int) -> torch.Tensor:
        """(rows, blocks) int32, in the backend's blocks, which may be smaller than the manager's."""
        per_block = self._paged.block_size // kernel_block_size
        width = max(-(-row.stop // self._paged.block_size) for row in rows)
        table = np.zeros((len(rows), width), dtype=np.int32)
        for index, row in enumerate(rows):
            used = -(-row.stop // self._paged.block_size)
            table[index, :used] = row.block_ids[:used]
        if per_block > 1:
            table = (table[:, :, None] * per_block + np.arange(per_block, dtype=np.int32)).reshape(len(rows), -1)
        return self._paged.upload(torch.from_numpy(table))


__all__ = ["Row", "ScatteredForward"]
