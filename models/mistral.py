"""Mistral (arXiv:2310.06825): Llama with a sliding window, beyond which a layer's queries see nothing."""

from __future__ import annotations

from .llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Llama's layers; ``ModelConfig.sliding_window`` (absent in later Mistral models) reaches their attention."""
