"""Random weights: right in kind, the same by seed, of any size at no cost."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_data import tiny_model

from cupy_engine.errors import ConfigError
from cupy_engine.hf_config import load_hf_config
from cupy_engine.model_source import open_weights, resolve_model
from cupy_engine.weights import DummyWeights

CONFIG = load_hf_config(tiny_model("llama"))


def dummy(**options: Any) -> DummyWeights:
    return DummyWeights(CONFIG, **options)


def test_values_are_normal_and_small() -> None:
    values = dummy().take("model.layers.0.mlp.up_proj.weight", (160, 64))
    assert values.shape == (160, 64)
    assert abs(values.mean()) < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "transformer.h.0.ln_1.weight"]
)
def test_norm_weights_are_near_one(name: str) -> None:
    values = dummy().take(name, (64,))
    assert abs(values - 1).max() < 0.2
    assert values.std() > 0


def test_norm_biases_are_near_zero() -> None:
    assert abs(dummy().take("transformer.h.0.ln_1.bias", (64,))).max() < 0.2


def test_equal_seeds_give_equal_weights_in_any_order() -> None:
    first, second, other = dummy(seed=3), dummy(seed=3), dummy(seed=4)
    a, b = (first.take(name, (32, 16)) for name in ("a", "b"))
    np.testing.assert_array_equal(b, second.take("b", (32, 16)))
    np.testing.assert_array_equal(a, second.take("a", (32, 16)))
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, other.take("a", (32, 16)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", ml_dtypes.bfloat16, np.float32])
def test_dtype_as_asked(dtype: Any) -> None:
    expected = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    weights = dummy(dtype=dtype)
    assert weights.take("a", (3, 5)).dtype == expected
    assert weights.take("model.norm.weight", (5,)).dtype == expected


@pytest.mark.parametrize("shape", [(1,), (5000,), (128256, 4096), (32, 14336, 64), (8, 4, 2, 2), (3 << 20, 8)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    array = dummy().take("a", shape)
    assert array.shape == shape
    last = array[tuple(size - 1 for size in shape)]
    assert np.isfinite(last)


def test_rows_differ() -> None:
    rows = dummy().take("a", (128256, 16))
    assert len(np.unique(rows[::501], axis=0)) == len(rows[::501])


def test_a_matrix_of_windows_has_full_rank() -> None:
    assert np.linalg.matrix_rank(dummy().take("a", (256, 256))) == 256


def test_an_8b_model_costs_nothing_to_make() -> None:
    weights = dummy(dtype="bfloat16")
    start_s = time.perf_counter()
    for layer in range(32):
        for name, shape in (("self_attn.q_proj", (4096, 4096)), ("mlp.up_proj", (14336, 4096))):
            weights.take(f"model.layers.{layer}.{name}.weight", shape)
    assert time.perf_counter() - start_s < 0.5


def test_has_what_the_configuration_does_not_rule_out() -> None:
    weights = dummy()
    assert weights.has("lm_head.weight")
    assert not weights.has("model.layers.0.self_attn.q_proj.bias")
    assert not weights.has("model.layers.0.mlp.down_proj.bias")
    tied = DummyWeights(replace(CONFIG, tie_word_embeddings=True, attention_bias=True, mlp_bias=True))
    assert not tied.has("lm_head.weight")
    assert tied.has("model.layers.0.self_attn.q_proj.bias")
    assert tied.has("model.layers.0.mlp.down_proj.bias")
    assert weights.unused() == []


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model("llama") / "config.json").read_text())
    weights = open_weights(resolve_model(tmp_path), CONFIG, load_format="dummy", dtype="float16")
    assert weights.take("model.embed_tokens.weight", (256, 64)).dtype == np.float16
    weights.close()


def test_an_unknown_load_format() -> None:
    with pytest.raises(ConfigError, match="load_format: must be 'auto' or 'dummy', got 'pickle'"):
        open_weights(resolve_model(tiny_model("llama")), CONFIG, load_format="pickle")  # type: ignore[arg-type]
