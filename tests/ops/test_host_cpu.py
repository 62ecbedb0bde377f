"""BLAS without threads of its own, in a process that has just begun."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cupy_engine.host_cpu import has_avx512

PROGRAM = """
import os, sys
import cupy_engine.server.engine_process
assert "numpy" not in sys.modules, "too late for BLAS"
from cupy_engine.host_cpu import keep_blas_to_one_thread
keep_blas_to_one_thread()
import numpy
numpy.ones((512, 512)) @ numpy.ones((512, 512))
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(
    not has_avx512() or len(os.sched_getaffinity(0)) < 2, reason="BLAS keeps its threads, or has one core"
)
@pytest.mark.parametrize(("wanted", "num_threads"), [(None, 1), ("2", 2)])
def test_blas_computes_on_one_thread_unless_told_otherwise(wanted: str | None, num_threads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    environment |= {} if wanted is None else {"OPENBLAS_NUM_THREADS": wanted}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert int(done.stdout) == num_threads
