"""The worker class to name in ``--worker-cls``: the platform's own, which hands its runner over.

A connector is not given the model by vLLM; a worker subclass is the supported way to reach it
(vllm/v1/worker/worker_base.py). Its extra methods are called with ``collective_rpc``.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvblend_rag.vllm_plugin import compat
from kvblend_rag.vllm_plugin.connector import KVBlendConnector
from kvblend_rag.vllm_plugin.metadata import StepPlan
from kvblend_rag.vllm_plugin.worker.worker_side import WorkerSide, hot_bytes


class KVBlendWorker(compat.platform_worker()):  # type: ignore[misc]
    """vLLM's worker of this platform with the chunk store's maintenance calls."""

    _refusing: WorkerSide | None = None
    """Of an encoder-decoder model, which vLLM runs without a connector: it says why nothing is blended."""

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As the platform's; then the connector gets the model runner."""
        super().initialize_from_config(kv_cache_config)
        if self.vllm_config.kv_transfer_config is None and self.vllm_config.model_config.is_encoder_decoder:
            self._refusing = WorkerSide(self.vllm_config)
        side = self._side()
        if side is not None:
            side.bind(self.model_runner)

    def determine_available_memory(self) -> int:
        """As the platform's, less what hot chunks may take; a size that the user gave for the KV cache is kept."""
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes:
            return available
        return available - hot_bytes(self.vllm_config)

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """As the platform's, timed; what the step blends goes to the device before vLLM prepares its own inputs."""
        connector = compat.find_connector(KVBlendConnector)
        plan = scheduler_output.kv_connector_metadata
        if connector is None or not isinstance(plan, StepPlan):
            return super().execute_model(scheduler_output)
        with connector.worker.step(plan.number):
            if not compat.writes_blocks(scheduler_output):
                connector.worker.begin(plan)
            return super().execute_model(scheduler_output)

    def kvblend(self, method: str, *arguments: Any) -> Any:
        """Call a public method of the worker side; see WorkerSide for their names."""
        side = self._side()
        if side is None:
            raise RuntimeError("This engine runs without the kvblend connector.")
        return getattr(side, method)(*arguments)

    def _side(self) -> WorkerSide | None:
        connector = compat.find_connector(KVBlendConnector)
        return self._refusing if connector is None else connector.worker
