"""Structured outputs on a GPU: random models write what was asked for, beside others that run ahead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from byte_model import make_byte_model

from cupy_engine import Engine, SamplingParams, StructuredOutputs

pytestmark = pytest.mark.gpu
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("budget", [8192, 24], ids=["whole", "chunks"])
def test_guided_and_free_sequences_side_by_side(tmp_path: Path, budget: int) -> None:
    forms = [StructuredOutputs(json=SCHEMA), StructuredOutputs(regex="[a-f]{3,30}"), None]
    params = [
        SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=80, structured_outputs=forms[i % 3]) for i in range(24)
    ]
    options = {"device": "cuda", "max_num_seqs": 32, "max_num_batched_tokens": budget, "num_kv_blocks": 400}
    with Engine(model=make_byte_model(tmp_path), load_format="dummy", max_model_len=256, **options) as engine:
        outputs = engine.generate(["Describe a person, as JSON, please: "] * 24, params)
    for i, output in enumerate(outputs):
        for completion in output.outputs:
            if i % 3 == 0:
                assert completion.finish_reason == "stop"
                assert json.loads(completion.text).keys() == {"name", "age"}
            elif i % 3 == 1:
                assert re.fullmatch("[a-f]{3,30}", completion.text)
