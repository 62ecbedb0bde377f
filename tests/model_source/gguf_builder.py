"""GGUF files for tests: whole models with the gguf library's writer, hostile ones byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from golden_data import tiny_model
from safetensors.numpy import load_file

LLAMA_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2_NAMES = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def hf_tensors(name: str) -> dict[str, np.ndarray]:
    """A tiny model's tensors as its safetensors file has them."""
    return load_file(tiny_model(name) / "model.safetensors")


def write_tiny_llama(path: Path, name: str = "llama", quantization: str = "F32", **metadata: Any) -> Path:
    """A tiny Llama as llama.cpp's converter would write it: q and k rows permuted for ggml's rope."""
    config = json.loads((tiny_model(name) / "config.json").read_text())
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    _add_metadata(writer, metadata)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for hf_name, tensor in hf_tensors(name).items():
        num_heads = heads.get(hf_name.split(".")[-2])
        stored = permute_for_ggml(tensor, num_heads) if num_heads else tensor
        _add_tensor(writer, gguf_name(hf_name, LLAMA_NAMES), stored, quantization)
    return _finish(writer, path)


def write_tiny_gpt2(path: Path, **metadata: Any) -> Path:
    """A tiny GPT-2 as llama.cpp's converter would write it: linear weights as [out, in]."""
    config = json.loads((tiny_model("gpt2") / "config.json").read_text())
    writer = GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    _add_metadata(writer, metadata)
    for hf_name, tensor in hf_tensors("gpt2").items():
        is_linear = ".c_" in hf_name and hf_name.endswith(".weight")
        _add_tensor(writer, gguf_name(hf_name, GPT2_NAMES), tensor.T if is_linear else tensor, "F32")
    return _finish(writer, path)


def permute_for_ggml(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows i and i + d/2 of each head side by side, as ggml's rope wants its pairs."""
    head_dim = len(tensor) // num_heads
    order = np.arange(head_dim).reshape(2, -1).T.reshape(-1)
    rows = np.concatenate([head * head_dim + order for head in range(num_heads)])
    return tensor[rows]


def gguf_name(hf_name: str, names: dict[str, str]) -> str:
    module, suffix = hf_name.rsplit(".", 1)
    if module in names:
        return f"{names[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{names[rest]}.{suffix}"


def _add_metadata(writer: GGUFWriter, metadata: dict[str, Any]) -> None:
    for key, value in metadata.items():
        key = key.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _add_tensor(writer: GGUFWriter, name: str, tensor: np.ndarray, quantization: str) -> None:
    if tensor.ndim == 1 or quantization == "F32":
        writer.add_tensor(name, np.ascontiguousarray(tensor))
        return
    kind = GGMLQuantizationType[quantization]
    writer.add_tensor(name, quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def entry(key: str, type_id: int, value: bytes) -> bytes:
    """One metadata entry with its value already packed."""
    return string(key) + struct.pack("<I", type_id) + value


def tensor_info(name: str, dims: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    packed_dims = struct.pack(f"<{len(dims)}Q", *dims)
    return string(name) + struct.pack("<I", len(dims)) + packed_dims + struct.pack("<IQ", type_id, offset)


def gguf_bytes(
    entries: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these parts; counts may lie."""
    entries, infos = entries or [], infos or []
    counts = (len(infos) if num_tensors is None else num_tensors, len(entries) if num_entries is None else num_entries)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(infos)
    return header + b"\0" * (-len(header) % alignment) + data
