"""transformers as a yardstick: the same shape and lengths, random weights made on the device, static batches, sdpa.

It runs in a process of its own, before ours, so that neither finds the other's memory or threads:

    python -m cupy_engine.bench.baseline < spec.json > result.json
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import msgspec
import numpy as np

from cupy_engine.errors import ConfigError
from cupy_engine.model_config import ModelConfig
from cupy_engine.model_source import load_model_config, resolve_model

from .workloads import Workload

_WARM_UP_TOKENS = 8


class BaselineSpec(msgspec.Struct):
    """What to run. ``config`` is a ``config.json``; ``dtype`` may be ``auto``; ``device`` is ``auto``, cpu or cuda."""

    config: dict[str, Any]
    device: str
    dtype: str
    workload: Workload
    batch_size: int
    repeat: int


class BaselineResult(msgspec.Struct):
    """Wall seconds of each run: of all batches to the full length, and of all batches to the first token."""

    system: str
    full_s: list[float]
    first_s: list[float]


def run_baseline(options: dict[str, Any], workload: Workload, batch_size: int, repeat: int) -> BaselineResult:
    """Measure transformers in a process of its own. ``options`` are the engine's.

    Raises:
        ConfigError: transformers or torch is not installed, or it failed.
    """
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigError("baseline", f"{' and '.join(missing)} must be installed: pip install torch transformers")
    config = hf_config(load_model_config(resolve_model(options["model"])))
    spec = BaselineSpec(
        config,
        options.get("device", "auto"),
        options.get("dtype", "auto"),
        workload,
        batch_size,
        repeat,
    )
    command = [sys.executable, "-m", "cupy_engine.bench.baseline"]
    done = subprocess.run(command, input=msgspec.json.encode(spec), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise ConfigError("baseline", f"transformers failed with status {done.returncode}; see above")
    return msgspec.json.decode(done.stdout, type=BaselineResult)


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a model, made from its hyper-parameters where it came without one."""
    if "architectures" in model.raw:
        return dict(model.raw)
    assert model.rope is not None, "a GGUF file of a model with rotary embeddings"
    return {
        "model_type": "mistral" if model.architecture.startswith("Mistral") else "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": model.activation,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "tie_word_embeddings": model.tie_word_embeddings,
    }


def measure(spec: BaselineSpec) -> BaselineResult:
    """Runs in the baseline's own process."""
    import torch
    import transformers

    auto_model: Any = transformers.AutoModelForCausalLM
    has_gpu = torch.cuda.is_available() if spec.device == "auto" else spec.device == "cuda"
    device = "cuda" if has_gpu else "cpu"
    dtype = spec.dtype if spec.dtype != "auto" else "bfloat16" if has_gpu else "float32"
    config = dict(spec.config)
    config = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device(device):
        model = auto_model.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    name = torch.cuda.get_device_name() if has_gpu else "CPU"
    system = f"transformers {transformers.__version__}, torch {torch.__version__}, {name}, {dtype}, sdpa"
    rng = np.random.default_rng(0)
    workload, sizes = spec.workload, _batch_sizes(spec.workload.num_requests, spec.batch_size)

    def run(sizes: list[int], num_tokens: int) -> float:
        batches = [rng.integers(0, config.vocab_size, (size, workload.input_len)) for size in sizes]
        start_s = time.monotonic()
        for batch in batches:
            _generate(model, torch.from_numpy(batch).to(device), num_tokens)
        return time.monotonic() - start_s

    run(sizes[:1], min(_WARM_UP_TOKENS, workload.output_len))
    first_s = [run(sizes, 1) for _ in range(spec.repeat)]
    if workload.output_len == 1:
        return BaselineResult(system, first_s, first_s)
    return BaselineResult(system, [run(sizes, workload.output_len) for _ in range(spec.repeat)], first_s)


def _batch_sizes(num_requests: int, batch_size: int) -> list[int]:
    return [min(batch_size, num_requests - start) for start in range(0, num_requests, batch_size)]


def _generate(model: Any, token_ids: Any, num_tokens: int) -> None:
    """Greedy, to the full length whatever comes; waits for the result."""
    import torch

    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        ).cpu()
    assert out.shape[1] == token_ids.shape[1] + num_tokens


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=BaselineSpec)
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever the libraries print
    output.write(msgspec.json.encode(measure(spec)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
