"""Arrays for kernel tests: fresh random inputs, poisoned outputs, errors in the norm."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# ‖result - reference‖ / ‖reference‖ for one rounding to the type of float32 arithmetic
ROUNDING = {"float32": 2e-6, "float16": 6e-4, "bfloat16": 5e-3}


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Normally distributed values."""
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def to_gpu(array: np.ndarray) -> Any:
    import cupy

    return cupy.asarray(array)


def poisoned(shape: tuple[int, ...], dtype: Any) -> Any:
    """A GPU array of NaN: what a kernel does not write shows."""
    import cupy

    return cupy.asarray(np.full(shape, np.nan, np.float32).astype(dtype))


def relative_error(result: Any, reference: np.ndarray) -> float:
    """‖result - reference‖ / ‖reference‖; NaN where either has one."""
    result64 = np.asarray(result.get() if hasattr(result, "get") else result).astype(np.float64)
    reference64 = reference.astype(np.float64)
    return float(np.linalg.norm(result64 - reference64) / np.linalg.norm(reference64))
