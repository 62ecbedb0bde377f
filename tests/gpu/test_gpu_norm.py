"""Normalization kernels against their references."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_arrays import DTYPES, ROUNDING, poisoned, random, relative_error, to_gpu

from cupy_engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

pytestmark = pytest.mark.gpu

SHAPES = [(1, 4096), (3, 576), (5, 37), (2, 6000), (257, 1024)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_norm_matches_reference(rng: np.random.Generator, shape: tuple[int, int], dtype: str, centered: bool) -> None:
    x = random(rng, shape, DTYPES[dtype])
    parameters = [random(rng, shape[1:], DTYPES[dtype]) for _ in range(2 if centered else 1)]
    function = layer_norm if centered else rms_norm
    out = poisoned(shape, DTYPES[dtype])
    result = function(to_gpu(x), *map(to_gpu, parameters), 1e-5, out=out)
    assert result is out
    assert relative_error(out, function(x, *parameters, 1e-5)) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_fused_addition_updates_the_residual(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str, centered: bool
) -> None:
    x, residual = random(rng, shape, DTYPES[dtype]), random(rng, shape, DTYPES[dtype])
    parameters = [random(rng, shape[1:], DTYPES[dtype]) for _ in range(2 if centered else 1)]
    function = add_layer_norm if centered else add_rms_norm
    x_gpu, residual_gpu = to_gpu(x), to_gpu(residual)
    function(x_gpu, residual_gpu, *map(to_gpu, parameters), 1e-5, out=x_gpu)
    reference = function(x, residual, *parameters, 1e-5)
    assert np.array_equal(residual_gpu.get(), residual)
    assert relative_error(x_gpu, reference) < ROUNDING[dtype]


def test_no_tokens_launch_nothing() -> None:
    empty = to_gpu(np.empty((0, 64), np.float32))
    assert rms_norm(empty, to_gpu(np.ones(64, np.float32)), 1e-5).shape == (0, 64)


def test_a_strided_array_is_refused(rng: np.random.Generator) -> None:
    x = to_gpu(random(rng, (4, 128), np.float32))[:, :64]
    with pytest.raises(ValueError, match="x must be contiguous"):
        rms_norm(x, to_gpu(np.ones(64, np.float32)), 1e-5)
