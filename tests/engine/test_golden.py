"""The default model gives the tokens and log-probabilities of the golden file, however the work is cut up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from golden_data import greedy_prompts

from cupy_engine import Engine, RequestOutput, SamplingParams

CASES = greedy_prompts()
TOLERANCE = 2e-3


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=48, stop_token_ids=[0], **options)


def check_tokens(case: dict[str, Any], output: RequestOutput) -> None:
    expected = case["greedy_token_ids"]
    assert output.token_ids[: len(expected)] == expected, case["name"]
    assert output.token_ids[len(expected) :] in ([], [0], [2]), case["name"]
    assert output.text == case["greedy_text"], case["name"]
    assert output.finish_reason == ("length" if len(expected) == 48 else "stop"), case["name"]


@pytest.fixture(scope="module", params=[8192, 512, 16], ids=lambda n: f"{n}-tokens-a-step")
def engine(request: pytest.FixtureRequest, default_model_name: str) -> Iterator[Engine]:
    with Engine(model=default_model_name, max_num_batched_tokens=request.param) as engine:
        yield engine


def test_tokenizer_agrees(engine: Engine) -> None:
    tokenizer = engine.frontend.tokenizer
    assert tokenizer is not None
    for case in CASES:
        assert tokenizer.encode(case["prompt"], add_special_tokens=False) == case["prompt_token_ids"], case["name"]


def test_greedy_tokens_and_logprobs(engine: Engine) -> None:
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
    params = greedy(logprobs=5, prompt_logprobs=0)
    for case, output in zip(CASES, engine.generate(prompts, params), strict=True):
        check_tokens(case, output)
        assert output.logprobs is not None
        assert output.prompt_logprobs is not None
        for entry, golden in zip(output.logprobs, case["top5_logprobs"], strict=False):
            assert [lp.logprob for lp in entry.top] == pytest.approx([lp for _, lp in golden], abs=TOLERANCE)
            assert entry.logprob == pytest.approx(golden[0][1], abs=TOLERANCE)
        got = [lp.logprob for lp in output.prompt_logprobs[1:] if lp is not None]
        assert got[: len(case["prompt_logprobs"])] == pytest.approx(case["prompt_logprobs"], abs=TOLERANCE)
        assert len(got) == len(case["prompt_token_ids"]) - 1


def test_warm_prefix_cache_changes_nothing(engine: Engine) -> None:
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
    engine.generate(prompts, greedy())
    outputs = engine.generate(prompts, greedy())
    for case, output in zip(CASES, outputs, strict=True):
        check_tokens(case, output)
        assert output.num_cached_tokens == (len(case["prompt_token_ids"]) - 1) // 16 * 16


def test_one_at_a_time_without_prefix_cache(default_model_name: str) -> None:
    with Engine(model=default_model_name, enable_prefix_caching=False) as engine:
        for case in CASES:
            [output] = engine.generate({"prompt_token_ids": case["prompt_token_ids"]}, greedy())
            check_tokens(case, output)
            assert output.num_cached_tokens == 0


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_preemption_changes_nothing(default_model_name: str, mode: str, steps_in_flight: int) -> None:
    """The longest request comes first and leaves 17 blocks, so the others push each other out as they grow."""
    cases = sorted(CASES, key=lambda case: -len(case["prompt_token_ids"]))
    with Engine(
        model=default_model_name,
        num_kv_blocks=100,
        admission_mode="greedy",
        preemption_mode=mode,
        max_steps_in_flight=steps_in_flight,
        enable_prefix_caching=False,
    ) as engine:
        prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in cases]
        outputs = engine.generate(prompts, greedy())
        stats = engine.stats()
    for case, output in zip(cases, outputs, strict=True):
        check_tokens(case, output)
    preemptions = {"recompute": stats.num_preemptions_recompute, "swap": stats.num_preemptions_swap}
    assert preemptions[mode] > 0
    assert stats.num_free_kv_blocks == stats.num_kv_blocks
