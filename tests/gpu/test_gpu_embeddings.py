"""Embeddings on a GPU are those of the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from cupy_engine import Engine
from cupy_engine.model_source import ModelFiles

pytestmark = pytest.mark.gpu
PROMPTS = [*("The cat sat on the mat. " * n for n in range(1, 7)), "x"]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_embeddings(default_model: ModelFiles, pooling: str, dtype: str, tolerance: float) -> None:
    options = {"model": default_model.name, "max_model_len": 128, "num_kv_blocks": 64, "max_num_seqs": 8}
    with Engine(device="cpu", **options) as cpu:
        expected = cpu.embed(PROMPTS, pooling=pooling)
    for budget in (8192, 16):
        with Engine(device="cuda", dtype=dtype, max_num_batched_tokens=budget, **options) as gpu:
            np.testing.assert_allclose(gpu.embed(PROMPTS, pooling=pooling), expected, atol=tolerance)
