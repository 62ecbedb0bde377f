"""Which hidden states a worker asks its model for: those drawn from, or all where something else reads them."""

from __future__ import annotations

from typing import Any

import pytest
from golden_data import tiny_model

from cupy_engine import Engine, SamplingParams

PROMPT = {"prompt_token_ids": list(range(5, 45))}


class ObservedModel:
    """A model, and how many states each step asked it for; ``None`` for all."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.compute_logits = model.compute_logits
        self.num_rows: list[int | None] = []

    def forward(self, batch: Any, kv_cache: Any) -> Any:
        self.num_rows.append(None if batch.output_rows is None else len(batch.output_rows))
        return self._model.forward(batch, kv_cache)


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [({}, [0, 0, 1, 1]), ({"n": 3, "temperature": 1.0}, [0, 0, 1, 3]), ({"prompt_logprobs": 0}, [None, None, None, 1])],
    ids=["greedy", "three answers", "scores of the prompt"],
)
def test_of_a_prompt_in_chunks_of_16(options: dict[str, Any], num_rows: list[int | None]) -> None:
    with Engine(model=str(tiny_model("llama")), device="cpu", max_num_batched_tokens=16) as engine:
        worker = engine._core._executor._worker  # type: ignore[attr-defined]
        worker._model = observed = ObservedModel(worker._model)
        engine.generate([PROMPT], SamplingParams(max_tokens=2, ignore_eos=True, **options))
    assert observed.num_rows == num_rows


def test_of_a_prompt_that_is_embedded() -> None:
    with Engine(model=str(tiny_model("llama")), device="cpu", max_num_batched_tokens=16) as engine:
        worker = engine._core._executor._worker  # type: ignore[attr-defined]
        worker._model = observed = ObservedModel(worker._model)
        engine.embed([PROMPT])
    assert observed.num_rows == [None, None, None]
