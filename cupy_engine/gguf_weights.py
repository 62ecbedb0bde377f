"""Tensors of a GGUF file under their Hugging Face names, layout and orientation, dequantized to float32.

Dequantizing runs ahead in file order in a small thread pool (NumPy releases the GIL) while the model builds its layers;
SmolLM2's 135 M values take 0.3 s on two cores.
"""

from __future__ import annotations

import os
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import ml_dtypes
import numpy as np

from cupy_engine.errors import ModelLoadError
from cupy_engine.gguf_config import ROPE_FACTORS
from cupy_engine.gguf_file import GGUFFile, GGUFTensor
from cupy_engine.model_config import ModelConfig
from cupy_engine.weights import check_shape

_MAX_AHEAD_BYTES = 256 << 20
_MAX_THREADS = 4
_SLAB_BYTES = 128 << 10
_STORED_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}

_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "transformer.h.{}.ln_1",
    "attn_qkv": "transformer.h.{}.attn.c_attn",
    "attn_output": "transformer.h.{}.attn.c_proj",
    "ffn_norm": "transformer.h.{}.ln_2",
    "ffn_up": "transformer.h.{}.mlp.c_fc",
    "ffn_down": "transformer.h.{}.mlp.c_proj",
}


class GGUFWeights:
    """A WeightSource over a GGUF file. At most 256 MiB (or one tensor) are dequantized ahead of ``take``."""

    def __init__(self, gguf: GGUFFile, config: ModelConfig) -> None:
        self._path = gguf.path
        self._config = config
        self._data = np.memmap(gguf.path, np.uint8, "r")
        self._tensors = {_hf_name(config, tensor.name): tensor for tensor in gguf.tensors.values()}
        self._tensors.pop(ROPE_FACTORS, None)  # the configuration took it
        in_file_order = sorted(self._tensors, key=lambda name: self._tensors[name].offset)
        self._not_begun = deque(in_file_order)
        self._ahead: dict[str, Future[np.ndarray]] = {}
        self._ahead_bytes = 0
        self._taken: set[str] = set()
        self._pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "dequantize")
        self._run_ahead()

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelLoadError("is missing", file=self._path, tensor=name)
        check_shape(self._hf_shape(name, tensor), shape, self._path, name)
        self._taken.add(name)
        future = self._ahead.pop(name, None)
        if future is None:
            return self._load(name)
        array = future.result()
        self._ahead_bytes -= _float32_bytes(tensor)
        self._run_ahead()
        return array

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.num_bytes if tensor.type_name in _STORED_DTYPES else _float32_bytes(tensor)
            for tensor in self._tensors.values()
        )

    def has(self, name: str) -> bool:
        return name in self._tensors

    def unused(self) -> list[str]:
        return [name for name in self._tensors if name not in self._taken]

    def close(self) -> None:
        self._not_begun.clear()
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def _run_ahead(self) -> None:
        while self._not_begun and self._ahead_bytes < _MAX_AHEAD_BYTES:
            name = self._not_begun.popleft()
            if name not in self._taken:
                self._ahead_bytes += _float32_bytes(self._tensors[name])
                self._ahead[name] = self._pool.submit(self._load, name)

    def _load(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        raw = self._data[tensor.offset : tensor.offset + tensor.num_bytes].view(np.ndarray)
        num_heads = self._num_rotated_heads(name)
        if num_heads:
            raw = self._undo_rope_permutation(raw, tensor, num_heads)
        try:
            array = _dequantize(raw, tensor).reshape(tensor.shape)
        except NotImplementedError as error:
            raise ModelLoadError(f"type {tensor.type_name} cannot be read", file=self._path, tensor=name) from error
        return array.T if self._is_transposed(name) else array

    def _hf_shape(self, name: str, tensor: GGUFTensor) -> tuple[int, ...]:
        return tensor.shape[::-1] if self._is_transposed(name) else tensor.shape

    def _is_transposed(self, name: str) -> bool:
        """GPT-2's linear layers keep their weights as [in, out], ggml turns all to [out, in]."""
        return self._config.architecture == "GPT2LMHeadModel" and re.search(r"\.c_\w+\.weight$", name) is not None

    def _num_rotated_heads(self, name: str) -> int:
        if re.search(r"\.q_proj\.\w+$", name):
            return self._config.num_heads
        return self._config.num_kv_heads if re.search(r"\.k_proj\.\w+$", name) else 0

    def _undo_rope_permutation(self, raw: np.ndarray, tensor: GGUFTensor, num_heads: int) -> np.ndarray:
        """Put the rows of a head back from ggml's order, pairs (i, i + d/2) side by side, to Hugging Face's halves."""
        num_rows = tensor.shape[0]
        if num_rows % (2 * num_heads) or raw.size % num_rows:
            raise ModelLoadError(
                f"{num_rows} rows do not split into {num_heads} heads", file=self._path, tensor=tensor.name
            )
        pairs = raw.reshape(num_heads, num_rows // num_heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(-1)


def _hf_name(config: ModelConfig, gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``; unknown names stay."""
    names = _GPT2_NAMES if config.architecture == "GPT2LMHeadModel" else _LLAMA_NAMES
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in names:
        return gguf_name
    return f"{names[match[2]].format(match[1])}.{match[3]}"


def _float32_bytes(tensor: GGUFTensor) -> int:
    return tensor.num_bytes // tensor.block_bytes * tensor.block_elements * 4


def _dequantize(raw: np.ndarray, tensor: GGUFTensor) -> np.ndarray:
    """Bytes of whole blocks → their values, 1-D. Types that are not quantized stay views in their own dtype.

    In slabs, because the library makes several arrays of a tensor's size on the way: slabs stay in the cache.
    """
    if tensor.type_name in _STORED_DTYPES:
        return raw.view(_STORED_DTYPES[tensor.type_name])
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    quantization = GGMLQuantizationType[tensor.type_name]
    blocks = raw.reshape(-1, tensor.block_bytes)
    values = np.empty((len(blocks), tensor.block_elements), np.float32)
    slab = max(1, _SLAB_BYTES // tensor.block_bytes)
    with np.errstate(all="ignore"):  # a damaged file may have infinite scales
        for start in range(0, len(blocks), slab):
            rows = slice(start, start + slab)
            values[rows] = dequantize(blocks[rows].reshape(1, -1), quantization).reshape(-1, tensor.block_elements)
    return values.reshape(-1)
