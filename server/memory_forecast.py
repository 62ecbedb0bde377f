"""How a model would fit into memory, from its hyper-parameters: nothing is loaded."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from cupy_engine.config import EngineConfig
from cupy_engine.cuda_backend import CudaBackend
from cupy_engine.device import NumpyDevice
from cupy_engine.errors import ConfigError
from cupy_engine.hollow_model import weight_bytes
from cupy_engine.kv_cache import bytes_per_block
from cupy_engine.memory_plan import MemoryPlan, check_weights_fit, plan_kv_memory, wanted_model_len
from cupy_engine.model_config import ModelConfig

_CONTEXT_BYTES = 600 << 20  # a CUDA context, kernels and libraries: 527 MiB and some on an H100
_PROMPT_ROWS = 256


class MemoryForecast(msgspec.Struct):
    """Bytes and blocks as the engine would plan them on ``place``; ``problem``: why it would refuse, and the way out.

    ``workspace_bytes`` is an estimate, which the engine replaces by a measurement. ``needed_bytes``: of device memory,
    for one request of the longest context.
    """

    place: str
    dtype: str
    memory_bytes: int
    weight_bytes: int
    workspace_bytes: int
    needed_bytes: int
    kv_cache_bytes: int = 0
    block_size: int = 0
    num_kv_blocks: int = 0
    max_model_len: int = 0
    problem: str = ""


def forecast_cpu(config: EngineConfig, model: ModelConfig) -> MemoryForecast:
    """On this machine's CPU, as its memory is now. Raises ConfigError: a field asks for more than the model has."""
    from cupy_engine.backend import NumpyBackend

    backend = NumpyBackend()
    free_bytes = NumpyDevice().free_memory_bytes()
    forecast = _forecast(config, model, "CPU (NumPy)", backend.dtype(config, model), free_bytes, 0, 1.0)
    return _fill(forecast, lambda: backend.plan_memory(config, model, None, np.float32), free_bytes)  # type: ignore[arg-type]


def forecast_gpu(
    config: EngineConfig, model: ModelConfig, name: str, memory_bytes: int, free_bytes: int | None = None
) -> MemoryForecast:
    """On a GPU with ``memory_bytes``, of which others leave ``free_bytes`` (default: all). Raises like the CPU's."""
    share = config.gpu_memory_utilization
    dtype = CudaBackend.dtype(config, model)
    forecast = _forecast(config, model, name, dtype, memory_bytes, _CONTEXT_BYTES, share)
    room_bytes = min(int(share * memory_bytes), memory_bytes if free_bytes is None else free_bytes)
    budget_bytes = room_bytes - forecast.weight_bytes - forecast.workspace_bytes
    beside = f" beside weights of {_mib(forecast.weight_bytes)} and workspace of {_mib(forecast.workspace_bytes)}"

    def plan() -> MemoryPlan:
        return plan_kv_memory(
            config, model, dtype, budget_bytes, "gpu_memory_utilization", is_limit=True, beside=beside
        )

    return _fill(forecast, plan, room_bytes)


def _forecast(
    config: EngineConfig, model: ModelConfig, place: str, dtype: Any, memory_bytes: int, base_bytes: int, share: float
) -> MemoryForecast:
    item_bytes = np.dtype(dtype).itemsize
    weights = weight_bytes(model, dtype)
    workspace = base_bytes + _workspace_bytes(config, model, item_bytes)
    num_blocks = -(-wanted_model_len(config, model) // config.block_size)
    needed = (weights + workspace + num_blocks * bytes_per_block(model, config.block_size, dtype)) / share
    return MemoryForecast(place, np.dtype(dtype).name, memory_bytes, weights, workspace, int(needed))


def _fill(forecast: MemoryForecast, plan: Any, room_bytes: int) -> MemoryForecast:
    """Add what ``plan()`` says, or why it says no."""
    try:
        check_weights_fit(forecast.weight_bytes, room_bytes, forecast.place)
        memory: MemoryPlan = plan()
    except ConfigError as error:
        forecast.problem = str(error)
        return forecast
    forecast.kv_cache_bytes = memory.num_blocks * memory.bytes_per_block
    forecast.block_size = memory.block_size
    forecast.num_kv_blocks = memory.num_blocks
    forecast.max_model_len = memory.max_model_len
    return forecast


def _workspace_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """The largest step: a token's stream, norm and output, gate, up and their product; and logits in float32."""
    per_token = 3 * (model.hidden_size + model.intermediate_size) * item_bytes
    num_rows = 2 * config.max_num_seqs + _PROMPT_ROWS  # of draws, once more in the graphs; of prompts
    return config.max_num_batched_tokens * per_token + 4 * num_rows * model.vocab_size


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
