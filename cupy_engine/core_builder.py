"""From a configuration to a running core: backend, model, memory, scheduler."""

from __future__ import annotations

import logging
import time
from typing import Any

from cupy_engine.adaptive_limit import AdaptiveLimit
from cupy_engine.backend import Backend, choose_backend
from cupy_engine.block_manager import BlockManager
from cupy_engine.config import EngineConfig
from cupy_engine.core import CoreInfo, EngineCore
from cupy_engine.expected_growth import ExpectedGrowth
from cupy_engine.guide_vocabulary import load_vocabulary
from cupy_engine.guides import Guides
from cupy_engine.hollow_model import weight_bytes
from cupy_engine.load_progress import show_progress
from cupy_engine.memory_plan import MemoryPlan, check_weights_fit, wanted_model_len
from cupy_engine.metrics import EngineMetrics
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_registry import CausalLM, model_class
from cupy_engine.model_source import ModelFiles, load_model_config, open_weights
from cupy_engine.overload import AdmissionRule
from cupy_engine.preemption import PreemptionCosts
from cupy_engine.request_queue import FcfsPolicy, Policy, PriorityPolicy
from cupy_engine.scheduler import Scheduler
from cupy_engine.step_pace import StepPace

logger = logging.getLogger("cupy_engine")


def build_core(config: EngineConfig, files: ModelFiles) -> EngineCore:
    """Load the model and put everything together.

    Raises:
        ModelLoadError, ConfigError: what is wrong, where, and the way out.
    """
    start_s = time.monotonic()
    model_config = load_model_config(files)
    wanted_model_len(config, model_config)
    backend = choose_backend(config)
    dtype = backend.dtype(config, model_config)
    check_weights_fit(weight_bytes(model_config, dtype), backend.room_bytes(config), backend.name)
    model = _load_model(config, files, model_config, backend, dtype)
    memory = backend.plan_memory(config, model_config, model, dtype)
    executor = backend.executor(config, model_config, model, memory, dtype)
    name = config.served_model_name or files.name
    limit = None if config.slo_ttft_s is None else AdaptiveLimit(config.slo_ttft_s)
    metrics = EngineMetrics(config.slo_ttft_s, config.slo_tpot_s, limit)
    pace = None if config.slo_tpot_s is None else StepPace(config.slo_tpot_s)
    costs = PreemptionCosts(config.preemption_mode, memory.bytes_per_block, backend.copy_bytes_per_s())
    mixed = config.max_num_mixed_tokens or backend.max_num_mixed_tokens
    scheduler = _build_scheduler(config, model_config, memory, costs, mixed, pace, limit, metrics)
    info = CoreInfo(
        backend=backend.name,
        model_name=name,
        max_model_len=memory.max_model_len,
        num_kv_blocks=memory.num_blocks,
        block_size=memory.block_size,
        weight_bytes=model.weights.num_bytes,
        kv_cache_bytes=memory.num_blocks * memory.bytes_per_block,
        load_time_s=time.monotonic() - start_s,
        gpu_ids=() if backend.device.pci_bus_id is None else (backend.device.pci_bus_id,),
        workspace_bytes=memory.workspace_bytes,
        graph_bytes=memory.graph_bytes,
        used_bytes=backend.used_bytes(),
        limit_bytes=memory.limit_bytes,
    )
    logger.info("%s", info.describe())
    depth = config.max_steps_in_flight or backend.max_steps_in_flight
    guides = Guides(lambda: load_vocabulary(config, files, model_config), model_config.vocab_size)
    rule = AdmissionRule(config.max_queue_len, config.slo_ttft_s)
    return EngineCore(scheduler, executor, metrics, info, guides, rule, pace, max_steps_in_flight=depth)


def _load_model(
    config: EngineConfig, files: ModelFiles, model_config: ModelConfig, backend: Backend, dtype: Any
) -> CausalLM:
    device = backend.device
    weights = open_weights(
        files, model_config, load_format=config.load_format, seed=config.seed or 0, dtype=dtype, device=device
    )
    with show_progress(weights) as watched:
        model = model_class(model_config.architecture)(model_config, watched, device, dtype)
    unused = weights.unused()
    weights.close()
    if unused:
        logger.warning("%d tensors of the files are not used, %s among them", len(unused), unused[0])
    return model


def _build_scheduler(
    config: EngineConfig,
    model: ModelConfig,
    memory: MemoryPlan,
    costs: PreemptionCosts,
    max_num_mixed_tokens: int,
    pace: StepPace | None,
    limit: AdaptiveLimit | None,
    metrics: EngineMetrics,
) -> Scheduler:
    policy: Policy = FcfsPolicy()
    if config.scheduling_policy == "priority":
        policy = PriorityPolicy(config.priority_ageing_s)
    manager = BlockManager(memory.num_blocks, memory.block_size, memory.num_host_blocks, config.enable_prefix_caching)
    return Scheduler(
        manager,
        policy,
        costs,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_mixed_tokens=max_num_mixed_tokens,
        pace=pace,
        limit=limit,
        growth=ExpectedGrowth(manager) if config.admission_mode == "expected" else None,
        max_model_len=memory.max_model_len,
        eos_token_ids=model.eos_token_ids,
        seed=config.seed,
        log_schedule=config.log_schedule,
        listener=metrics,
    )
