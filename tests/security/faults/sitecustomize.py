"""Faults for the processes of a server that has this folder in PYTHONPATH; each asked for by an environment variable.

FAULT_FILE     the Llama model breaks as that file says, once it is there: "KIND STEP", STEP 1 being the next step
CLOCK_STEPS    the host's clock jumps by an hour, to and fro
"""

from __future__ import annotations

import itertools
import os
import sys
import time

if "FAULT_FILE" in os.environ and "cupy_engine.server.engine_process" in sys.orig_argv:
    from cupy_engine.model_registry import register_model

    register_model("LlamaForCausalLM", "faulty_llama:FaultyLlama")

if "CLOCK_STEPS" in os.environ:
    real_time, jumps = time.time, itertools.cycle((0, 3600, -3600))
    time.time = lambda: real_time() + next(jumps)
