"""The default model's twin for tests that need no sense: its vocabulary and chat template, two small random layers."""

from __future__ import annotations

import json
from pathlib import Path

from cupy_engine.chat_template import load_chat_template
from cupy_engine.model_source import ModelFiles, load_model_config
from cupy_engine.tokenizer import load_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def make_tiny_twin(folder: Path, files: ModelFiles) -> Path:
    """Write the twin's files; serve it with ``--load-format dummy``."""
    tokenizer, template, model = load_tokenizer(files), load_chat_template(files), load_model_config(files)
    assert tokenizer is not None
    assert template is not None
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    ends = list(model.eos_token_ids)
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": model.vocab_size, "eos_token_id": ends, **SIZES}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template.text_with_tools}))
    return folder
