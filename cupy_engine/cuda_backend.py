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
from cupy_engine.loader import DenseProduct
from cupy_engine.memory_plan import MemoryPlan, plan_kv_memory
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import CausalLM
from cupy_engine.ops._gemm_tuning import tune
from cupy_engine.slot_table import SlotTable

_GRAPH_RESERVE_BYTES = 1 << 30  # captured graphs, their memory pool, and what the driver keeps for them
_COPY_PROBE_BYTES = 1 << 26
_FEW_ROWS = 512  # from here on a product's time hardly depends on whether its weight is in the cache


class CudaBackend:
    """The current GPU."""

    max_steps_in_flight = 2
    max_num_mixed_tokens = 2048

    def __init__(self) -> None:
        self.device = CudaDevice()

    @property
    def name(self) -> str:
        return f"CUDA ({self.device.description})"

    @staticmethod
    def dtype(config: EngineConfig, model: ModelConfig) -> Any:
        """``auto`` is what the model was stored in, or bfloat16 for one stored in float32."""
        if config.dtype != "auto":
            return DTYPES[config.dtype]
        return DTYPES[model.dtype if model.dtype in ("float16", "bfloat16") else "bfloat16"]

    def plan_memory(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> MemoryPlan:
        self.device.end_loading()
        with self.device.use():
            tune_products(model.weights.products, config.max_num_batched_tokens, config.max_num_seqs)
            self._profile(config, model_config, model, dtype)
        total = self.device.total_memory_bytes()
        used = total - self.device.free_memory_bytes()
        budget = int(config.gpu_memory_utilization * total) - used - _GRAPH_RESERVE_BYTES
        return plan_kv_memory(config, model_config, dtype, budget, "gpu_memory_utilization")

    def _profile(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> None:
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
        self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, memory: MemoryPlan, dtype: Any
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


def tune_products(products: list[DenseProduct], max_num_tokens: int, max_num_seqs: int) -> None:
    """Time the ways to compute every product of a model, unless that is known from an earlier start.

    Layers of one shape are timed together, so that few rows read their weights from memory as a step does.
    """
    alike: dict[tuple[Any, ...], list[DenseProduct]] = {}
    for product in products:
        alike.setdefault((product.weight.shape, product.has_bias, np.dtype(product.out_dtype)), []).append(product)
    for (_, has_bias, out_dtype), group in alike.items():
        weights = [product.weight for product in group]
        most_rows = max_num_tokens if len(group) > 1 else max_num_seqs  # only the head stands alone
        row_counts = [1 << i for i in range(most_rows.bit_length()) if 1 << i <= most_rows] + [most_rows]
        tune(weights, [m for m in row_counts if m < _FEW_ROWS], out_dtype, has_bias)
        tune(weights[:2], [m for m in row_counts if m >= _FEW_ROWS], out_dtype, has_bias)
