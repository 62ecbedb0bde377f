"""Where the engine computes: what a backend decides about dtype and memory, and how it runs steps."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from cupy_engine.config import GIB, EngineConfig
from cupy_engine.cuda_device import why_no_cuda
from cupy_engine.device import Device, NumpyDevice
from cupy_engine.errors import ConfigError
from cupy_engine.executor import Executor, InProcessExecutor
from cupy_engine.kv_cache import KVCache
from cupy_engine.memory_plan import MemoryPlan, check_host_room, plan_kv_memory
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import CausalLM
from cupy_engine.sampler import Sampler
from cupy_engine.slot_table import SlotTable
from cupy_engine.worker import Worker

logger = logging.getLogger("cupy_engine")

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_CPU_KV_BYTES = 4 * GIB
_CPU_KV_SHARE = 0.4


class Backend(Protocol):
    """One kind of device."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def device(self) -> Device: ...

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps pay off, unless the configuration says."""

    @property
    def max_num_mixed_tokens(self) -> int:
        """Tokens of a step that holds up decoding sequences for no longer than people notice, likewise."""

    def dtype(self, config: EngineConfig, model: ModelConfig) -> Any:
        """Of weights and KV cache."""

    def room_bytes(self, config: EngineConfig) -> int:
        """Memory for weights and all else, before anything is loaded."""

    def plan_memory(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> MemoryPlan:
        """Size the KV cache, with the weights loaded. Raises ConfigError if a request would not fit."""

    def executor(
        self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, memory: MemoryPlan, dtype: Any
    ) -> Executor:
        """Allocate the KV cache and make what runs steps."""

    def used_bytes(self) -> int:
        """Memory of the device that the engine has taken; 0 if nobody counts."""

    def copy_bytes_per_s(self) -> float:
        """Measured bandwidth of swapping."""


def choose_backend(config: EngineConfig) -> Backend:
    """CUDA where there is a GPU and CuPy, else NumPy, unless the configuration says.

    Raises:
        ConfigError: CUDA is asked for and cannot be had; says why.
    """
    if config.device == "cpu":
        return NumpyBackend()
    if config.device == "auto" and (reason := why_no_cuda()) is not None:
        logger.info("computing on the CPU with NumPy: %s", reason)
        return NumpyBackend()
    from cupy_engine.cuda_backend import CudaBackend

    return CudaBackend()


class NumpyBackend:
    """The CPU, in float32."""

    name = "NumPy (CPU)"
    max_steps_in_flight = 1
    max_num_mixed_tokens = 128

    def __init__(self) -> None:
        self.device = NumpyDevice()

    def dtype(self, config: EngineConfig, model: ModelConfig) -> Any:
        if config.dtype not in ("auto", "float32"):
            raise ConfigError(
                "dtype", f"the CPU computes in float32 only, got {config.dtype!r}; use 'auto' or 'float32'"
            )
        return np.float32

    def room_bytes(self, config: EngineConfig) -> int:
        return self.device.free_memory_bytes()

    def plan_memory(self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, dtype: Any) -> MemoryPlan:
        free_bytes = self.device.free_memory_bytes()
        budget = config.kv_cache_memory_bytes or min(_CPU_KV_BYTES, int(_CPU_KV_SHARE * free_bytes))
        memory = plan_kv_memory(config, model_config, dtype, budget, "kv_cache_memory_bytes")
        check_host_room(config, memory, free_bytes)
        return memory

    def executor(
        self, config: EngineConfig, model_config: ModelConfig, model: CausalLM, memory: MemoryPlan, dtype: Any
    ) -> Executor:
        num_slots = config.max_num_seqs
        cache = KVCache(model_config, memory.num_blocks, memory.block_size, memory.num_host_blocks, self.device, dtype)
        sampler = Sampler(num_slots, model_config.vocab_size, self.device)
        slots = SlotTable(num_slots, memory.blocks_per_sequence, memory.block_size)
        return InProcessExecutor(Worker(model, cache, sampler, slots, num_slots))

    def used_bytes(self) -> int:
        return 0

    def copy_bytes_per_s(self) -> float:
        source, target = np.ones(1 << 24, np.uint8), np.ones(1 << 24, np.uint8)
        start_s = time.perf_counter()
        np.copyto(target, source)
        return source.nbytes / (time.perf_counter() - start_s)
