"""The engine's configuration: validated once, frozen thereafter."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cupy_engine.errors import ConfigError

DType = Literal["auto", "float32", "float16", "bfloat16"]
DeviceName = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
SchedulingPolicy = Literal["fcfs", "priority"]
PreemptionMode = Literal["auto", "recompute", "swap"]
AdmissionMode = Literal["expected", "greedy"]

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that can be chosen about an engine.

    Args:
        model: built-in name, folder, ``.gguf`` file or hub id.
        served_model_name: the name clients use; default: the model's own.
        tokenizer: folder or ``.gguf`` file to take the tokenizer from instead of the model's.
        load_format: ``dummy`` makes random weights from the model's hyper-parameters alone.
        dtype: of weights and KV cache; ``auto`` is float32 on the CPU.
        device: ``auto`` takes CUDA where there is a usable GPU backend, else the CPU.
        quantization: name of a quantization scheme; ``None`` runs the weights as they are.
        tensor_parallel_size, pipeline_parallel_size: workers that share the model.
        max_model_len: most tokens of prompt and output together; default: what the model was made for.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: token budget of one step; longer prompts are computed in chunks.
        max_num_mixed_tokens: prompt tokens of a step in which sequences decode, so that long prompts do not hold up
            streams; default: the backend's for a server, no limit of their own in :class:`~cupy_engine.Engine`.
        block_size: tokens per KV block.
        num_kv_blocks: KV blocks, instead of a size computed from memory.
        kv_cache_memory_bytes: memory for the KV cache on the CPU; default: up to 4 GiB of what is free.
        gpu_memory_utilization: share of a GPU's memory that weights, workspace and KV cache may take together.
        swap_space_bytes: host memory for sequences preempted by swap.
        enable_prefix_caching: keep finished KV blocks findable by content.
        scheduling_policy: ``fcfs`` or ``priority``.
        priority_ageing_s: with ``priority``, waiting this long is worth one priority level, so nothing starves.
        admission_mode: ``expected`` lets a request in when there will be blocks for what it and others are expected to
            generate, ``greedy`` when there are some for its prompt.
        preemption_mode: how a sequence makes room; ``auto`` takes what is expected to be cheaper.
        max_queue_len: most requests that may wait.
        slo_ttft_s: turn away requests whose first token would come later than this, and keep up to half of the seats
            empty while that of more than one in a hundred does who find a seat at once.
        slo_tpot_s: let requests wait where one more would make streams wait longer than this for a token, on average.
        max_steps_in_flight: steps submitted before the first one's tokens are known; default: the backend's.
        seed: of the seeds drawn for requests that bring none; ``None`` is different every time.
        log_schedule: write every scheduling decision to the log ``cupy_engine.schedule``.

    Raises:
        ConfigError: a bad value; ``field`` names it.
    """

    model: str = "smollm2-135m"
    served_model_name: str | None = None
    tokenizer: str | None = None
    load_format: LoadFormat = "auto"
    dtype: DType = "auto"
    device: DeviceName = "auto"
    quantization: str | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_num_mixed_tokens: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    swap_space_bytes: int = GIB
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    priority_ageing_s: float = 30.0
    admission_mode: AdmissionMode = "expected"
    preemption_mode: PreemptionMode = "auto"
    max_queue_len: int = 1024
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None
    max_steps_in_flight: int | None = None
    seed: int | None = None
    log_schedule: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(name, f"must be at least {low}, got {value}")
        for name, high in _MAXIMUM.items():
            if getattr(self, name) > high:
                raise ConfigError(name, f"must be at most {high}, got {getattr(self, name)}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                "gpu_memory_utilization", f"must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        for name in ("priority_ageing_s", "slo_ttft_s", "slo_tpot_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(name, f"must be above 0, got {value}")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) != 1:
                raise ConfigError(name, f"only 1 is supported in this version, got {getattr(self, name)}")
        if self.quantization is not None:
            raise ConfigError("quantization", f"unknown scheme {self.quantization!r}; this version knows none")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; :meth:`from_dict` is the way back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EngineConfig:
        """Raises ConfigError for a field that does not exist."""
        check_names(values, {field.name for field in dataclasses.fields(cls)})
        return cls(**values)


_MINIMUM = {
    "max_model_len": 1,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "max_num_mixed_tokens": 1,
    "block_size": 1,
    "num_kv_blocks": 1,
    "kv_cache_memory_bytes": 1,
    "swap_space_bytes": 0,
    "max_queue_len": 1,
    "max_steps_in_flight": 1,
}


_MAXIMUM = {"max_num_seqs": 1 << 16, "max_num_batched_tokens": 1 << 24, "block_size": 1 << 16}


def check_names(values: Iterable[str], known: Collection[str]) -> None:
    """Hold names of options against those there are.

    Raises:
        ConfigError: the first unknown one; says which it is like, or else all there are.
    """
    for name in values:
        if name not in known:
            alike = get_close_matches(name, known)
            hint = f"did you mean {' or '.join(alike)}?" if alike else f"there are {', '.join(sorted(known))}"
            raise ConfigError(name, f"no such option; {hint}")


def check_types(config: Any) -> None:
    """Hold the fields of a configuration against their types: a file or a caller may have put anything there.

    Raises:
        ConfigError: the first that is of another type.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _check_type(field.name, getattr(config, field.name), hints[field.name])


def _check_type(name: str, value: Any, hint: Any) -> None:
    choices = [get_args(kind) for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    if choices:
        if value not in choices[0] and not (value is None and type(None) in get_args(hint)):
            raise ConfigError(name, f"must be one of {', '.join(map(repr, choices[0]))}, got {value!r}")
        return
    kinds = (tuple,) if get_origin(hint) is tuple else get_args(hint) or (hint,)
    is_number = float in kinds and isinstance(value, int)
    is_stray_bool = isinstance(value, bool) and bool not in kinds
    if not (isinstance(value, kinds) or is_number) or is_stray_bool:
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(name, f"must be {wanted}, got {value!r}")
