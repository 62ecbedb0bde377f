"""What the host's processor can do, and how BLAS uses it."""

from __future__ import annotations

import os
from functools import cache


@cache
def has_avx512() -> bool:
    """Whether this CPU has the instructions that OpenBLAS's kernels for small matrices are written for."""
    with open("/proc/cpuinfo") as lines:
        return any("avx512f" in line for line in lines if line.startswith("flags"))


def keep_blas_to_one_thread() -> None:
    """Let BLAS compute on the thread that calls it, where our own threads share large products (``ops/_tiled_matmul``).

    BLAS's threads wait for one another, so whoever else wants a core holds all of them up: on two cores beside one busy
    process a step of a tiny model took 3 times as long, beside two 6 times. For a process that has not loaded NumPy
    yet, and whose only work this is. ``OPENBLAS_NUM_THREADS`` goes before.
    """
    if has_avx512():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
