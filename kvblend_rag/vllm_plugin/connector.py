"""KVBlendConnector: vLLM's connector interface, dispatched by role; no logic of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvblend_rag.vllm_plugin import expected  # noqa: F401  first, since it says what others would trip over

# isort: split
import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from kvblend_rag.vllm_plugin.metadata import StepPlan
from kvblend_rag.vllm_plugin.metrics import BlendMetrics, BlendStats
from kvblend_rag.vllm_plugin.scheduler.scheduler_side import SchedulerSide
from kvblend_rag.vllm_plugin.worker.worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class KVBlendConnector(KVConnectorBase_V1):
    """Blends stored chunk KV into prompts; one instance in the scheduler's process, one in each worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig | None = None
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.scheduler = SchedulerSide(vllm_config)
        else:
            self.worker = WorkerSide(vllm_config)

    # Scheduler side

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """Learn from the workers what model this is."""
        self.scheduler.learn(list(metadata.values()))

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """The same of a pipeline, whose stages all refuse; vLLM's own version of this would not start."""
        self.scheduler.learn(list(metadata.values()))

    def on_new_request(self, request: Request) -> None:
        """Match and plan."""
        self.scheduler.arrived(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many prompt tokens behind the local prefix-cache hit we will provide."""
        return self.scheduler.claim(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """The request has its blocks."""
        self.scheduler.admitted(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers do in this step."""
        return self.scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers did."""
        self.scheduler.worker_reported(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once; the report travels with the last output."""
        return False, self.scheduler.finished(request)

    # Metrics

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """Counts since the last call."""
        if hasattr(self, "scheduler"):
            return self.scheduler.take_stats()
        return BlendStats()  # an older vLLM asks the scheduler's side only where the workers' answered

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """Counts that crossed to the front end."""
        return BlendStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """The counters of the front end."""
        return BlendMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Nothing to do: the caches are read off the layers when the runner is handed over."""

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What model this is and whether it can be blended."""
        return self.worker.handshake()

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Blend the requests admitted in this step, unless KVBlendWorker has, before vLLM's own forward."""
        self.worker.begin(self._step_plan())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to do: everything was loaded on the compute stream before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing to do: chunks are saved whole after the forward."""

    def wait_for_save(self) -> None:
        """Copy out the chunks that this step completed."""
        self.worker.save(self._step_plan().saves)

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What was done in this step."""
        return self.worker.take_outcomes()

    def shutdown(self) -> None:
        """Finish writing and close the store."""
        if hasattr(self, "worker"):
            self.worker.close()
        else:
            self.scheduler.close()

    def _step_plan(self) -> StepPlan:
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        return plan


__all__ = ["KVBlendConnector"]
