"""Embeddings on a GPU are those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from golden_data import tiny_model

from cupy_engine import Engine

pytestmark = pytest.mark.gpu
LENGTHS = (1, 2, 15, 16, 17, 90)
PROMPTS = [{"prompt_token_ids": [3 + (7 * i * i + i) % 250 for i in range(length)]} for length in LENGTHS]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_embeddings(pooling: str, dtype: str, tolerance: float) -> None:
    options = {"model": str(tiny_model("llama")), "max_model_len": 256, "num_kv_blocks": 128, "max_num_seqs": 8}
    with Engine(device="cpu", **options) as cpu:
        expected = cpu.embed(PROMPTS, pooling=pooling)
    for budget in (8192, 16):
        with Engine(device="cuda", dtype=dtype, max_num_batched_tokens=budget, **options) as gpu:
            np.testing.assert_allclose(gpu.embed(PROMPTS, pooling=pooling), expected, atol=tolerance)
