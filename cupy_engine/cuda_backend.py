"""The CUDA backend: one GPU, its memory counted out before anything is served."""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy_engine.backend import DTYPES
from cupy_engine.batch import AttentionMetadata, Batch
from cupy_engine.config import EngineConfig
from cupy_engine.cuda_device import CudaDevice
from cupy_engine.cuda_sampler import CudaSampler
from cupy_engine.cuda_worker import CudaWorker
from cupy_engine.executor import Executor
from cupy_engine.kv_cache import KVCache
from cupy_engine.memory_plan import MemoryPlan, plan_kv_memory
from cupy_engine.model_config import ModelConfig
from cupy_engine.slot_table import SlotTable
from cupy_engine.worker import Model

_GRAPH_RESERVE_BYTES = 1 << 30  # captured graphs, their memory pool, and what the driver keeps for them
_COPY_PROBE_BYTES = 1 << 26


class CudaBackend:
    """The current GPU."""

    max_steps_in_flight = 2

    def __init__(self) -> None:
        self.device = CudaDevice()

    @property
    def name(self) -> str:
        return f"CUDA ({self.device.description})"

    def dtype(self, config: EngineConfig, model: ModelConfig) -> Any:
        """``auto`` is what the model was stored in, or bfloat16 for one stored in float32."""
        if config.dtype != "auto":
            return DTYPES[config.dtype]
        return DTYPES[model.dtype if model.dtype in ("float16", "bfloat16") else "bfloat16"]

    def plan_memory(self, config: EngineConfig, model_config: ModelConfig, model: Model, dtype: Any) -> MemoryPlan:
        with self.device.use():
            self._profile(config, model_config, model, dtype)
        total = self.device.total_memory_bytes()
        used = total - self.device.free_memory_bytes()
        budget = int(config.gpu_memory_utilization * total) - used - _GRAPH_RESERVE_BYTES
        return plan_kv_memory(config, model_config, dtype, budget, "gpu_memory_utilization")

    def _profile(self, config: EngineConfig, model_config: ModelConfig, model: Model, dtype: Any) -> None:
        """Run the largest step once, so that its workspace is in the memory pool and counts as used."""
        num_tokens, xp = config.max_num_batched_tokens, self.device.xp
        cache = KVCache(model_config, 1, config.block_size, 0, self.device, dtype)
        lens = np.array([num_tokens], np.int32)
        attention = AttentionMetadata(
            query_start=xp.array([0, num_tokens], np.int32),
            context_lens=xp.asarray(lens),
            block_tables=xp.zeros((1, -(-num_tokens // config.block_size)), np.int32),
            slot_mapping=xp.full(num_tokens, -1, np.int32),
            max_query_len=num_tokens,
            max_context_len=num_tokens,
            host_query_lens=lens,
            host_context_lens=lens,
        )
        token_ids = xp.arange(num_tokens, dtype=np.int32) % model_config.vocab_size
        positions = xp.arange(num_tokens, dtype=np.int32)
        batch = Batch(token_ids, positions, attention, xp.zeros(1, np.int32))
        hidden = model.forward(batch, cache)
        model.compute_logits(hidden[: config.max_num_seqs])
        self.device.stream.synchronize()

    def executor(
        self, config: EngineConfig, model_config: ModelConfig, model: Model, memory: MemoryPlan, dtype: Any
    ) -> Executor:
        num_slots = config.max_num_seqs
        with self.device.use():
            cache = KVCache(
                model_config, memory.num_blocks, memory.block_size, memory.num_host_blocks, self.device, dtype
            )
            worker = CudaWorker(
                self.device,
                model,
                cache,
                CudaSampler(num_slots, model_config.vocab_size, self.device),
                SlotTable(num_slots, memory.blocks_per_sequence, memory.block_size),
                max_num_tokens=config.max_num_batched_tokens,
                max_num_seqs=num_slots,
                table_width=memory.blocks_per_sequence,
                max_steps_in_flight=config.max_steps_in_flight or self.max_steps_in_flight,
            )
        worker.graphs.capture_all()
        return worker

    def copy_bytes_per_s(self) -> float:
        import cupyx

        xp, stream = self.device.xp, self.device.stream
        host = cupyx.empty_pinned(_COPY_PROBE_BYTES, np.uint8)
        start, end = xp.cuda.Event(), xp.cuda.Event()
        with self.device.use():
            target = xp.empty(_COPY_PROBE_BYTES, np.uint8)
            start.record(stream)
            target.set(host, stream=stream)
            end.record(stream)
            end.synchronize()
        return _COPY_PROBE_BYTES / (float(xp.cuda.get_elapsed_time(start, end)) / 1e3)
