"""What the benchmarks run: random token ids, greedy, every request to its full length.

ttft-N      one request of N tokens, 1 token out
lat         one request, 128 → 256
dec-B       B equal requests, 32 → 256
thr-short   256 requests, 128 → 256, all at once
thr-long    200 requests, 1024 → 128, all at once
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupy_engine.errors import ConfigError
from cupy_engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """``num_requests`` equal requests, submitted at once. Lengths in tokens."""

    name: str
    input_len: int
    output_len: int
    num_requests: int

    def prompts(self, vocab_size: int, rng: np.random.Generator) -> list[dict[str, list[int]]]:
        """Fresh random prompts."""
        ids = rng.integers(0, vocab_size, (self.num_requests, self.input_len))
        return [{"prompt_token_ids": row} for row in ids.tolist()]

    def sampling_params(self, output_len: int | None = None) -> SamplingParams:
        """Greedy, to the full length whatever comes."""
        return SamplingParams(max_tokens=output_len or self.output_len, temperature=0.0, ignore_eos=True)

    def describe(self) -> str:
        """``16 requests 128 → 64``."""
        plural = "request" if self.num_requests == 1 else "requests"
        return f"{self.num_requests} {plural} {self.input_len} → {self.output_len}"


def named_workload(name: str) -> Workload:
    """The workload of that name.

    Raises:
        ConfigError: there is none; says which there are.
    """
    fixed = {"lat": (128, 256, 1), "thr-short": (128, 256, 256), "thr-long": (1024, 128, 200)}
    if name in fixed:
        return Workload(name, *fixed[name])
    if match := re.fullmatch(r"ttft-([1-9]\d*)", name):
        return Workload(name, int(match[1]), 1, 1)
    if match := re.fullmatch(r"dec-([1-9]\d*)", name):
        return Workload(name, 32, 256, int(match[1]))
    raise ConfigError("workload", f"{name!r} is unknown; there are ttft-N, dec-B, {', '.join(fixed)}")


def _llama(hidden: int, layers: int, heads: tuple[int, int], inner: int, vocab: int, **others: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": inner,
        "vocab_size": vocab,
        "max_position_embeddings": 8448,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
        **others,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-twin": _llama(32, 1, (1, 1), 64, 4096, rope_theta=100000.0, tie_word_embeddings=True),
    "smollm2-135m": _llama(576, 30, (9, 3), 1536, 49152, rope_theta=100000.0, tie_word_embeddings=True),
    "llama2-7b": _llama(4096, 32, (32, 32), 11008, 32000, tie_word_embeddings=False),
    "llama3-8b": _llama(4096, 32, (32, 8), 14336, 128256, rope_theta=500000.0, tie_word_embeddings=False),
}


def write_shape(name: str, folder: Path, vocab_size: int | None = None) -> Path:
    """Write the ``config.json`` of a shape: all that dummy weights need. Returns the model's folder.

    Args:
        vocab_size: instead of the shape's own, so that another model's tokenizer fits.
    """
    model = folder / name
    model.mkdir()
    config = SHAPES[name] | ({"vocab_size": vocab_size} if vocab_size else {})
    (model / "config.json").write_text(json.dumps(config))
    return model
