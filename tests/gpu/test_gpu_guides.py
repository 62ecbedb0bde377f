"""Structured outputs on a GPU: the default model's outputs have the form asked for, beside others that run ahead."""

from __future__ import annotations

import json
import re

import pytest

from cupy_engine import Engine, SamplingParams, StructuredOutputs
from cupy_engine.model_source import ModelFiles

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
def test_guided_and_free_sequences_side_by_side(default_model: ModelFiles, budget: int) -> None:
    forms = [StructuredOutputs(json=SCHEMA), StructuredOutputs(regex="[a-f]{3,30}"), None]
    params = [
        SamplingParams(temperature=1.0, seed=i, n=2, max_tokens=80, structured_outputs=forms[i % 3]) for i in range(24)
    ]
    options = {"device": "cuda", "max_num_seqs": 32, "max_num_batched_tokens": budget, "num_kv_blocks": 400}
    with Engine(model=default_model.name, max_model_len=256, **options) as engine:
        outputs = engine.generate(["Describe a person, as JSON, please: "] * 24, params)
    for i, output in enumerate(outputs):
        for completion in output.outputs:
            if i % 3 == 0:
                assert completion.finish_reason == "stop"
                assert json.loads(completion.text).keys() == {"name", "age"}
            elif i % 3 == 1:
                assert re.fullmatch("[a-f]{3,30}", completion.text)
