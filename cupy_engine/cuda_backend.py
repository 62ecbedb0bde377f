"""The CUDA backend: one GPU, its memory counted out before anything is served."""

from __future__ import annotations

from dataclasses import replace
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
from cupy_engine.memory_plan import MemoryPlan, plan_kv_memory, wanted_model_len
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import CausalLM
from cupy_engine.ops._gemm_table import row_buckets
from cupy_engine.ops._gemm_tuning import tune, tune_gated
from cupy_engine.prompt_scores import ROWS_AT_A_TIME
from cupy_engine.slot_table import SlotTable

_LAZY_BYTES = 32 << 20  # kernels that are loaded when they are first needed
_SMALL_ARRAYS_BYTES = 32 << 20  # of steps that are smaller than those rehearsed
_COPY_PROBE_BYTES = 1 << 24
_FEW_ROWS = 512  # from here on a product's time hardly depends on whether its weight is in the cache


class CudaBackend:
    """The current GPU."""

    max_steps_in_flight = 2
    max_num_mixed_tokens = 2048

    def __init__(self) -> None:
        self.device = CudaDevice()
        self._worker: CudaWorker | None = None
        self._later_bytes = 0  # what requests may come to need
        self._copy_bytes_per_s = 0.0

    @property
    def name(self) -> str:
        return f"CUDA ({self.device.description})"

    @staticmethod
    def dtype(config: EngineConfig, model: ModelConfig) -> Any:
        """``auto`` is what the model was stored in, or bfloat16 for one stored in float32."""
        if config.dtype != "auto":
            return DTYPES[config.dtype]
        return DTYPES[model.dtype if model.dtype in ("float16", "bfloat16") else "bfloat16"]

    def room_bytes(self, config: EngineConfig) -> int:
        return min(self._limit_bytes(config) - self.device.own_memory_bytes(), self.device.free_memory_bytes())

    def plan_memory(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> MemoryPlan:
        """Take everything but the KV cache, and see what is left of the stated share."""
        device, weight_bytes = self.device, model.weights.num_bytes
        device.end_loading()
        with device.use():
            tune_products(model.weights.products, config.max_num_batched_tokens, config.max_num_seqs)
            self._copy_bytes_per_s = measure_copies(device)
        device.release_unused()
        workspace_bytes, graph_bytes = self._rehearse(config, model_config, model, dtype)
        limit_bytes = self._limit_bytes(config)
        budget_bytes = min(
            limit_bytes - weight_bytes - workspace_bytes - graph_bytes,
            device.free_memory_bytes() - self._later_bytes - _LAZY_BYTES,
        )
        weights, workspace, graphs = (f"{n / (1 << 20):.0f} MiB" for n in (weight_bytes, workspace_bytes, graph_bytes))
        beside = f" beside weights of {weights}, workspace of {workspace} and graphs of {graphs}"
        plan = plan_kv_memory(
            config, model_config, dtype, budget_bytes, "gpu_memory_utilization", is_limit=True, beside=beside
        )
        return replace(plan, workspace_bytes=workspace_bytes, graph_bytes=graph_bytes, limit_bytes=limit_bytes)

    def _rehearse(
        self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any
    ) -> tuple[int, int]:
        """Run the largest steps and capture all graphs on a KV cache of one block.

        Returns:
            The bytes of the workspace, with what requests and kernels may come to need, and of the graphs.
        """
        device = self.device
        with device.use():
            worker = self._worker = self._make_worker(config, model_config, model, dtype)
            _run_largest_step(config, model_config, model, device, dtype)
            worker.warm_up()
            without_graphs_bytes = device.own_memory_bytes() - worker.graphs.pool_bytes
            worker.capture_graphs()
        self._later_bytes = config.max_num_seqs * worker.max_bytes_per_slot + _SMALL_ARRAYS_BYTES
        workspace_bytes = without_graphs_bytes - model.weights.num_bytes + self._later_bytes + _LAZY_BYTES
        return workspace_bytes, device.own_memory_bytes() - without_graphs_bytes

    def _limit_bytes(self, config: EngineConfig) -> int:
        return int(config.gpu_memory_utilization * self.device.total_memory_bytes())

    def _make_worker(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> CudaWorker:
        """A worker for the longest context that may turn out to fit, on a KV cache of one block."""
        num_slots = config.max_num_seqs
        table_width = -(-wanted_model_len(config, model_config) // config.block_size)
        return CudaWorker(
            self.device,
            model,
            KVCache(model_config, 1, config.block_size, 0, self.device, dtype),
            CudaSampler(num_slots, model_config.vocab_size, self.device),
            SlotTable(num_slots, table_width, config.block_size),
            max_num_tokens=config.max_num_batched_tokens,
            max_num_graph_tokens=min(config.max_num_batched_tokens, self.max_num_mixed_tokens + num_slots),
            max_num_seqs=num_slots,
            table_width=table_width,
            max_steps_in_flight=config.max_steps_in_flight or self.max_steps_in_flight,
        )

    def executor(
        self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, memory: MemoryPlan, dtype: Any
    ) -> Executor:
        worker, self._worker = self._worker, None
        assert worker is not None, "memory is planned first"
        width = memory.blocks_per_sequence
        with self.device.use():
            cache = KVCache(
                model_config, memory.num_blocks, memory.block_size, memory.num_host_blocks, self.device, dtype
            )
            worker.attach(cache, SlotTable(config.max_num_seqs, width, memory.block_size), width)
        self.device.limit_growth(self._later_bytes)
        return worker

    def used_bytes(self) -> int:
        return self.device.own_memory_bytes()

    def copy_bytes_per_s(self) -> float:
        return self._copy_bytes_per_s


def _run_largest_step(
    config: EngineConfig, model_config: ModelConfig, model: CausalLM, device: CudaDevice, dtype: Any
) -> None:
    """Run the largest step once, so that its workspace is in the memory pool and counts as used."""
    num_tokens, xp = config.max_num_batched_tokens, device.xp
    cache = KVCache(model_config, 1, config.block_size, 0, device, dtype)
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
    batch = Batch(token_ids, positions, attention)
    hidden = model.forward(batch, cache)
    # Draws and scores of prompts need logits at the same time.
    logits = [model.compute_logits(hidden[:num_rows]) for num_rows in (config.max_num_seqs, ROWS_AT_A_TIME)]
    device.stream.synchronize()
    del logits


def measure_copies(device: CudaDevice) -> float:
    """Bytes per second from pinned memory to the GPU."""
    import cupyx

    xp, stream = device.xp, device.stream
    host = cupyx.empty_pinned(_COPY_PROBE_BYTES, np.uint8)
    start, end = xp.cuda.Event(), xp.cuda.Event()
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
        key = (product.weight.shape, product.has_bias, np.dtype(product.out_dtype), product.activation)
        alike.setdefault(key, []).append(product)
    for (_, has_bias, out_dtype, activation), group in alike.items():
        most_rows = max_num_tokens if len(group) > 1 else max_num_seqs  # only the head stands alone
        few = [m for m in row_buckets(most_rows) if m < _FEW_ROWS]
        many = [m for m in row_buckets(most_rows) if m >= _FEW_ROWS]
        all_weights = [product.weight for product in group]
        for weights, row_counts in ((all_weights, few), (all_weights[:2], many)):
            tune(weights, row_counts, out_dtype, has_bias)
            if activation is not None:
                tune_gated(weights, row_counts, activation.functor, has_bias)
