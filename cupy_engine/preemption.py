"""Swap or recompute? A cost model fed by what steps and copies really took."""

from __future__ import annotations

from dataclasses import dataclass

from cupy_engine.config import PreemptionMode

_WEIGHT_OF_NEW = 0.1


@dataclass(slots=True)
class PreemptionCosts:
    """Expected seconds to make room by dropping a sequence and to bring it back.

    ``prefill_s_per_token`` is a moving average over steps that mostly prefill; ``copy_bytes_per_s`` is the measured
    bandwidth between device and host.
    """

    mode: PreemptionMode
    bytes_per_block: int
    copy_bytes_per_s: float
    prefill_s_per_token: float = 1e-4

    def observe_prefill(self, num_tokens: int, duration_s: float) -> None:
        """A step that prefilled ``num_tokens`` took ``duration_s``."""
        self.prefill_s_per_token += _WEIGHT_OF_NEW * (duration_s / num_tokens - self.prefill_s_per_token)

    def recompute_s(self, num_computed_tokens: int) -> float:
        return num_computed_tokens * self.prefill_s_per_token

    def swap_s(self, num_blocks: int) -> float:
        return 2 * num_blocks * self.bytes_per_block / self.copy_bytes_per_s

    def prefers_swap(self, num_computed_tokens: int, num_blocks: int) -> bool:
        if self.mode == "auto":
            return self.swap_s(num_blocks) < self.recompute_s(num_computed_tokens)
        return self.mode == "swap"
