"""Memory is kept to the share that was stated, from the start and while requests of every kind run."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams
from cupy_engine.errors import ConfigError

pytestmark = pytest.mark.gpu

MIB = 1 << 20
VOCAB_SIZE = 32000


@pytest.fixture
def wide_model(tmp_path: Path) -> Path:
    """Little weight, and 16 KiB of keys and values per token: more than any share for 64 long requests."""
    config = json.loads((tiny_model("llama") / "config.json").read_text()) | {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 65536,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def open_engine(model: Path, **options: Any) -> Engine:
    gc.collect()  # the engines of other tests
    defaults = {
        "load_format": "dummy",
        "device": "cuda",
        "dtype": "bfloat16",
        "max_num_seqs": 64,
        "swap_space_bytes": 0,
    }
    return Engine(model=str(model), **(defaults | options))


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_the_share_is_used_and_not_exceeded(wide_model: Path, share: float) -> None:
    with open_engine(wide_model, gpu_memory_utilization=share) as engine:
        info = engine.info
        print(info.describe())
        assert info.used_bytes <= info.limit_bytes
        parts = info.weight_bytes + info.workspace_bytes + info.graph_bytes + info.kv_cache_bytes
        assert info.limit_bytes - 4 * MIB <= parts <= info.limit_bytes
        prompts = [{"prompt_token_ids": list(range(i, i + 700))} for i in range(64)]
        everything = SamplingParams(
            max_tokens=20,
            temperature=0.7,
            top_p=0.9,
            repetition_penalty=1.1,
            presence_penalty=0.1,
            logprobs=20,
            prompt_logprobs=20,
            logit_bias=dict.fromkeys(range(300), 1.0),
            bad_words=[],
            ignore_eos=True,
        )
        engine.generate(prompts, everything)
        used_bytes = engine._core._executor._device.own_memory_bytes()
        print(f"after requests {used_bytes / MIB:.1f} MiB")
        assert used_bytes <= info.limit_bytes


def test_a_share_too_small_is_refused(wide_model: Path) -> None:
    cupy = pytest.importorskip("cupy")
    with pytest.raises(ConfigError, match=r"has room for 0 MiB|are left for the KV cache beside weights of"):
        open_engine(wide_model, gpu_memory_utilization=240 * MIB / cupy.cuda.runtime.memGetInfo()[1])


def test_weights_too_large_are_refused_before_they_are_made(wide_model: Path) -> None:
    config = json.loads((wide_model / "config.json").read_text()) | {
        "intermediate_size": 1 << 20,
        "num_hidden_layers": 512,
    }
    (wide_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"model: the weights take \d+ MiB, but CUDA .* has room for \d+ MiB"):
        open_engine(wide_model)


def test_too_many_blocks_are_refused(wide_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_kv_blocks: 10000000 blocks take .*: lower it to at most \d+ or raise"):
        open_engine(wide_model, num_kv_blocks=10_000_000)
