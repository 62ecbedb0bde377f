"""What fits is planned, what does not is refused with what would."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_data import TINY_MODELS, tiny_model

from cupy_engine import Engine
from cupy_engine.config import EngineConfig
from cupy_engine.core import CoreInfo
from cupy_engine.device import NumpyDevice
from cupy_engine.errors import ConfigError
from cupy_engine.hf_config import load_hf_config
from cupy_engine.hollow_model import weight_bytes
from cupy_engine.kv_cache import bytes_per_block
from cupy_engine.memory_plan import MemoryPlan, plan_kv_memory
from cupy_engine.model_registry import model_class
from cupy_engine.model_source import open_weights, resolve_model

MODEL = load_hf_config(tiny_model("llama"))
BLOCK = bytes_per_block(MODEL, 16, np.float32)


def plan(budget_bytes: int, is_limit: bool = True, **options: Any) -> MemoryPlan:
    config = EngineConfig(max_num_seqs=4, **options)
    return plan_kv_memory(config, MODEL, np.float32, budget_bytes, "the_share", is_limit=is_limit, beside=" beside X")


def test_blocks_are_what_the_budget_holds_and_requests_can_use() -> None:
    assert plan(10 * BLOCK + 5, max_model_len=160).num_blocks == 10
    assert plan(1000 * BLOCK, max_model_len=160).num_blocks == 40
    assert plan(10 * BLOCK, num_kv_blocks=10, max_model_len=32).num_blocks == 10


def test_a_context_nobody_asked_for_shrinks() -> None:
    assert plan(2 * BLOCK).max_model_len == 32


@pytest.mark.parametrize(
    ("budget_bytes", "options", "message"),
    [
        (BLOCK - 1, {}, r"the_share: .* MiB are left for the KV cache beside X, but one block takes"),
        (-5, {}, r"the_share: 0 MiB are left"),
        (9 * BLOCK, {"max_model_len": 160}, r"max_model_len: 160 tokens need .* but it holds 144 tokens"),
        (9 * BLOCK, {"num_kv_blocks": 10}, r"num_kv_blocks: 10 blocks take .* left beside X: lower it to at most 9 or"),
    ],
)
def test_what_does_not_fit_is_refused(budget_bytes: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(budget_bytes, **options)


def test_without_a_limit_the_configuration_may_ask_for_more() -> None:
    assert plan(9 * BLOCK, is_limit=False, num_kv_blocks=10, max_model_len=16).num_blocks == 10


@pytest.mark.parametrize("name", TINY_MODELS)
def test_weights_are_weighed_without_being_loaded(name: str) -> None:
    config = load_hf_config(tiny_model(name))
    source = open_weights(resolve_model(tiny_model(name)), config)
    model = model_class(config.architecture)(config, source, NumpyDevice(), np.float32)
    assert weight_bytes(config, np.float32) == model.weights.num_bytes
    assert weight_bytes(config, ml_dtypes.bfloat16) == model.weights.num_bytes // 2
    assert model.weights.num_bytes <= source.num_bytes * 4
    source.close()


def test_a_model_that_memory_cannot_hold_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyDevice, "free_memory_bytes", lambda self: 100_000)
    with pytest.raises(ConfigError, match=r"model: the weights take .* MiB, but NumPy \(CPU\) has room for 0 MiB"):
        Engine(model=str(tiny_model("llama")), device="cpu")


def test_the_plan_in_words() -> None:
    info = CoreInfo("CUDA (X)", "m", 320, 20, 16, 1 << 20, 2 << 20, 1.5)
    assert (
        "weights 1 MiB, KV cache 2 MiB = 20 blocks of 16 (320 tokens), up to 320 tokens a request, loaded in 1.50 s"
        in (info.describe())
    )
    info = CoreInfo("CUDA (X)", "m", 320, 20, 16, 1 << 20, 2 << 20, 1.5, (), 3 << 20, 4 << 20, 10 << 20, 12 << 20)
    assert "weights 1 MiB, workspace 3 MiB, graphs 4 MiB, KV cache 2 MiB" in info.describe()
    assert "10 MiB of 12 MiB in use, loaded" in info.describe()
