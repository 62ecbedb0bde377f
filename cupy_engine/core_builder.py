"""From a configuration to a running core: backend, memory plan, model, cache, scheduler."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cupy_engine.block_manager import BlockManager
from cupy_engine.config import GIB, EngineConfig
from cupy_engine.core import CoreInfo, EngineCore
from cupy_engine.device import Device, NumpyDevice
from cupy_engine.errors import ConfigError
from cupy_engine.executor import InProcessExecutor
from cupy_engine.kv_cache import KVCache, bytes_per_block
from cupy_engine.metrics import EngineMetrics
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import model_class
from cupy_engine.model_source import ModelFiles, load_model_config, open_weights
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request_queue import FcfsPolicy, Policy, PriorityPolicy
from cupy_engine.sampler import Sampler
from cupy_engine.scheduler import Scheduler
from cupy_engine.slot_table import SlotTable
from cupy_engine.worker import Worker

logger = logging.getLogger("cupy_engine")

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_CPU_KV_BYTES = 4 * GIB
_CPU_KV_SHARE = 0.4


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes of the KV pools and the context length that follows from them."""

    num_blocks: int
    num_host_blocks: int
    bytes_per_block: int
    max_model_len: int


def choose_device(name: str) -> Device:
    """The backend for ``device=name``.

    Raises:
        ConfigError: CUDA is asked for, but this version has no CUDA backend.
    """
    if name == "cuda":
        raise ConfigError("device", "this version serves on the CPU only; use device='cpu' or 'auto'")
    return NumpyDevice()


def choose_dtype(config: EngineConfig, device: Device) -> Any:
    """The dtype of weights and KV cache."""
    if device.name == "cpu" and config.dtype not in ("auto", "float32"):
        raise ConfigError("dtype", f"the CPU computes in float32 only, got {config.dtype!r}; use 'auto' or 'float32'")
    return _DTYPES["float32" if config.dtype == "auto" else config.dtype]


def plan_memory(config: EngineConfig, model: ModelConfig, device: Device, dtype: Any) -> MemoryPlan:
    """How many KV blocks there are, and how long a request may get.

    Raises:
        ConfigError: max_model_len is more than the model or the KV cache can hold; says what would fit.
    """
    block_bytes = bytes_per_block(model, config.block_size, dtype)
    wanted_len = config.max_model_len or model.max_position_embeddings
    if wanted_len > model.max_position_embeddings:
        raise ConfigError("max_model_len", f"{wanted_len} is more than the model's {model.max_position_embeddings}")
    num_blocks = config.num_kv_blocks or _affordable_blocks(config, device, block_bytes, wanted_len)
    num_tokens = num_blocks * config.block_size
    if num_tokens < wanted_len:
        if config.max_model_len is not None:
            need_mib = -(-wanted_len // config.block_size) * block_bytes / 2**20
            raise ConfigError(
                "max_model_len",
                f"{wanted_len} tokens need {need_mib:.0f} MiB of KV cache, but it holds {num_tokens} tokens "
                f"({num_blocks * block_bytes / 2**20:.0f} MiB): lower max_model_len or raise kv_cache_memory_bytes",
            )
        logger.info("max_model_len lowered from %d to the %d tokens that the KV cache holds", wanted_len, num_tokens)
    num_host_blocks = config.swap_space_bytes // block_bytes
    return MemoryPlan(num_blocks, num_host_blocks, block_bytes, min(wanted_len, num_tokens))


def _affordable_blocks(config: EngineConfig, device: Device, block_bytes: int, max_model_len: int) -> int:
    budget = config.kv_cache_memory_bytes or min(_CPU_KV_BYTES, int(_CPU_KV_SHARE * device.free_memory_bytes()))
    most_useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(budget // block_bytes, most_useful)
    if num_blocks < 1:
        raise ConfigError("kv_cache_memory_bytes", f"{budget} bytes hold no KV block; one takes {block_bytes} bytes")
    return int(num_blocks)


def build_core(config: EngineConfig, files: ModelFiles) -> EngineCore:
    """Load the model and put everything together.

    Raises:
        ModelLoadError, ConfigError: what is wrong, where, and the way out.
    """
    start_s = time.monotonic()
    device = choose_device(config.device)
    dtype = choose_dtype(config, device)
    model_config = load_model_config(files)
    memory = plan_memory(config, model_config, device, dtype)

    weights = open_weights(files, model_config, load_format=config.load_format, seed=config.seed or 0, dtype=dtype)
    model = model_class(model_config.architecture)(model_config, weights, device, dtype)
    unused = weights.unused()
    weights.close()
    if unused:
        logger.warning("%d tensors of the files are not used, %s among them", len(unused), unused[0])

    kv_cache = KVCache(model_config, memory.num_blocks, config.block_size, memory.num_host_blocks, device, dtype)
    sampler = Sampler(config.max_num_seqs, model_config.vocab_size, device)
    max_blocks = -(-memory.max_model_len // config.block_size)
    slots = SlotTable(config.max_num_seqs, max_blocks, config.block_size)
    name = config.served_model_name or files.name
    metrics = EngineMetrics(name)
    scheduler = _build_scheduler(config, model_config, memory, metrics)
    info = CoreInfo(
        backend="NumPy (CPU)",
        model_name=name,
        max_model_len=memory.max_model_len,
        num_kv_blocks=memory.num_blocks,
        block_size=config.block_size,
        weight_bytes=model.num_weight_bytes,
        kv_cache_bytes=memory.num_blocks * memory.bytes_per_block,
        load_time_s=time.monotonic() - start_s,
    )
    logger.info("%s", info.describe())
    executor = InProcessExecutor(Worker(model, kv_cache, sampler, slots, config.max_num_seqs))
    return EngineCore(scheduler, executor, metrics, info, max_steps_in_flight=config.max_steps_in_flight)


def _build_scheduler(config: EngineConfig, model: ModelConfig, memory: MemoryPlan, metrics: EngineMetrics) -> Scheduler:
    manager = BlockManager(memory.num_blocks, config.block_size, memory.num_host_blocks, config.enable_prefix_caching)
    policy: Policy = FcfsPolicy()
    if config.scheduling_policy == "priority":
        policy = PriorityPolicy(config.priority_ageing_s)
    costs = PreemptionCosts(config.preemption_mode, memory.bytes_per_block, measure_copy_bandwidth())
    return Scheduler(
        manager,
        policy,
        costs,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=memory.max_model_len,
        max_queue_len=config.max_queue_len,
        eos_token_ids=model.eos_token_ids,
        seed=config.seed,
        log_schedule=config.log_schedule,
        listener=metrics,
    )


def measure_copy_bandwidth(num_bytes: int = 1 << 24) -> float:
    """Bytes per second of a host copy, the cost of swapping on the CPU."""
    source, target = np.ones(num_bytes, np.uint8), np.ones(num_bytes, np.uint8)
    start_s = time.perf_counter()
    np.copyto(target, source)
    return num_bytes / (time.perf_counter() - start_s)
