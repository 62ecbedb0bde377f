"""A Llama that breaks when it is told to."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from cupy_engine.models.llama import LlamaForCausalLM

FAULT_FILE = Path(os.environ["FAULT_FILE"])


class FaultyLlama(LlamaForCausalLM):
    """Counts steps from the moment the file is there; breaks once, and removes it."""

    def forward(self, batch: Any, kv_cache: Any) -> Any:
        hidden = super().forward(batch, kv_cache)
        self._step = getattr(self, "_step", 0) + 1 if FAULT_FILE.exists() else 0
        if not self._step:
            return hidden
        kind, step = FAULT_FILE.read_text().split()
        if self._step < int(step):
            return hidden
        FAULT_FILE.unlink()
        match kind:
            case "exception":
                raise RuntimeError(f"a secret about {__file__}")
            case "memory":
                raise MemoryError("out of memory allocating 123 bytes")
            case "nan":
                return hidden * float("nan")
            case "hang":
                time.sleep(3600)
            case "exit":
                os._exit(7)
        return hidden
