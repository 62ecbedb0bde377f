"""Weights on the GPU: uploads in pieces, dummy weights made there, and an engine whose home cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_data import tiny_model
from gpu_arrays import DTYPES, random

from cupy_engine import pinned_uploads
from cupy_engine.cuda_device import CudaDevice
from cupy_engine.device import NumpyDevice
from cupy_engine.hf_config import load_hf_config
from cupy_engine.weights import DummyWeights

pytestmark = pytest.mark.gpu


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """Uploads in pieces of 64 KiB, so that small arrays go around the buffers several times."""
    monkeypatch.setattr(pinned_uploads, "PIECE_BYTES", 64 << 10)
    return CudaDevice()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_uploads(rng: np.random.Generator, device: CudaDevice, stored: str, dtype: str) -> None:
    source = random(rng, (700, 1300), DTYPES[stored])
    for parts in ([source], [source[:1], source[7:200:3], source[200:]], [source.T], [source[0]], [source[:0], source]):
        expected = NumpyDevice().stack(parts, DTYPES[dtype])
        stacked = device.stack(parts, DTYPES[dtype])
        device.stream.synchronize()
        assert stacked.dtype == DTYPES[dtype]
        np.testing.assert_array_equal(device.to_host(stacked).astype(np.float32), expected.astype(np.float32))
    device.end_loading()


@pytest.mark.parametrize("shape", [(512, 384), (5, 7), (1 << 19, 3), (4096,), (3 << 20, 2)])
def test_dummy_weights_are_those_of_the_host(device: CudaDevice, shape: tuple[int, ...]) -> None:
    config = load_hf_config(tiny_model("llama"))
    host = DummyWeights(config, seed=3, dtype=ml_dtypes.bfloat16)
    ours = DummyWeights(config, seed=3, dtype=ml_dtypes.bfloat16, device=device)
    for names in (["a.weight"], ["b.weight", "c.weight"], ["input_layernorm.weight"]):
        stacked = device.stack([ours.take(name, shape) for name in names], ml_dtypes.bfloat16)
        device.end_loading()
        expected = np.concatenate([host.take(name, shape) for name in names])
        np.testing.assert_array_equal(device.to_host(stacked).view(np.uint16), expected.view(np.uint16))


RUN = """
import sys
from cupy_engine import Engine, SamplingParams
with Engine(model=sys.argv[1], device="cuda", max_num_seqs=2, num_kv_blocks=64, swap_space_bytes=0) as engine:
    outputs = engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=4, ignore_eos=True))
    print(len(outputs[0].token_ids))
"""
NO_ROOM = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))"


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", NO_ROOM], ids=["read-only home", "full disk"])
def test_an_engine_without_a_writable_home_runs(tmp_path: Path, before: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUPY_", "XDG_"))}
    process = subprocess.run(
        [sys.executable, "-c", before + RUN, str(tiny_model("llama"))],
        env=environment | {"HOME": "/proc/no-such-home", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "4"
    assert "compiled kernels cannot be kept" in process.stderr
    assert list(tmp_path.iterdir()) == []
