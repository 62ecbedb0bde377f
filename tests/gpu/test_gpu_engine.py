"""The whole engine on a GPU: the tiny models give transformers' tokens, however steps are cut and run."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from golden_data import TINY_MODELS, tiny_model

from cupy_engine import Engine, RequestOutput, SamplingParams

pytestmark = pytest.mark.gpu
TOLERANCE = 2e-3
TRANSFORMERS_BFLOAT16 = {  # mean |Δ logprob| on an H100
    "gpt2": 0.0169,
    "llama": 0.0411,
    "llama-mqa-bias-tied": 0.0306,
    "llama-rope-linear": 0.0400,
    "llama-rope-llama3": 0.0385,
    "llama-rope-yarn": 0.0434,
    "mistral-sliding-window": 0.0367,
}
OPTIONS = {"device": "cuda", "dtype": "float32", "max_num_seqs": 8, "num_kv_blocks": 100, "swap_space_bytes": 1 << 24}


def cases(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((tiny_model(name) / "expected.json").read_text())
    return loaded


def prompts(name: str) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": case["prompt_token_ids"]} for case in cases(name)]


def greedy(num_tokens: int = 16, **others: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **others)


def check(name: str, outputs: list[Any]) -> None:
    for case, output in zip(cases(name), outputs, strict=True):
        assert case["min_margin"] > TOLERANCE
        assert output.token_ids == case["greedy_token_ids"]


@pytest.mark.parametrize("budget", [8192, 24], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models(name: str, budget: int) -> None:
    with Engine(model=str(tiny_model(name)), max_num_batched_tokens=budget, **OPTIONS) as engine:
        check(name, engine.generate(prompts(name), greedy()))  # one mixed batch
        check(name, engine.generate(prompts(name), greedy()))  # from the prefix cache
        for i, prompt in enumerate(prompts(name)):  # alone: other graphs
            assert engine.generate(prompt, greedy())[0].token_ids == cases(name)[i]["greedy_token_ids"]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_tiny_models_in_bfloat16(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Along the golden tokens, log-probabilities are about as near to float32 as those of transformers on a GPU.

    The weights of these models are large, so rounding counts for more than in a trained one.
    """
    forced = [{"prompt_token_ids": case["prompt_token_ids"] + case["greedy_token_ids"]} for case in cases(name)]
    params, model = greedy(1, prompt_logprobs=0), str(tiny_model(name))
    with Engine(model=model, **(OPTIONS | {"dtype": "bfloat16"})) as gpu, Engine(model=model, device="cpu") as cpu:
        pairs = zip(gpu.generate(forced, params), cpu.generate(forced, params), strict=True)
        errors = np.array([error for ours, theirs in pairs for error in distances(ours, theirs)])
    with capsys.disabled():
        print(f"\n{name}, bfloat16: mean {errors.mean():.4f} max {errors.max():.4f}")
    assert errors.mean() <= 1.1 * TRANSFORMERS_BFLOAT16[name]
    assert errors.max() <= 0.25


def distances(ours: RequestOutput, theirs: RequestOutput) -> list[float]:
    """|Δ logprob| of all tokens of a prompt but the first, which has none."""
    assert ours.prompt_logprobs is not None
    assert theirs.prompt_logprobs is not None
    pairs = zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)
    return [abs(a.logprob - b.logprob) for a, b in pairs if a is not None and b is not None]


def test_logprobs_agree_with_the_cpu() -> None:
    model, params = str(tiny_model("llama")), greedy(logprobs=4, prompt_logprobs=2)
    with Engine(model=model, **OPTIONS) as gpu, Engine(model=model, device="cpu") as cpu:
        for ours, theirs in zip(
            gpu.generate(prompts("llama"), params), cpu.generate(prompts("llama"), params), strict=True
        ):
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert [t.logprob for t in a.top] == pytest.approx([t.logprob for t in b.top], abs=TOLERANCE)
            assert max(distances(ours, theirs), default=0.0) < TOLERANCE


def test_seeded_samples_agree_with_the_cpu() -> None:
    params = SamplingParams(n=3, temperature=0.8, top_k=40, top_p=0.9, seed=5, max_tokens=16, repetition_penalty=1.2)
    model = str(tiny_model("llama"))
    with Engine(model=model, **OPTIONS) as gpu, Engine(model=model, device="cpu") as cpu:
        [ours] = gpu.generate(prompts("llama")[2], params)
        [theirs] = cpu.generate(prompts("llama")[2], params)
    assert [o.token_ids for o in ours.outputs] == [o.token_ids for o in theirs.outputs]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preemption_changes_nothing(mode: str) -> None:
    """12 blocks hold the beginnings of several sequences, but not their ends."""
    options = OPTIONS | {"num_kv_blocks": 12, "enable_prefix_caching": False}
    options |= {"admission_mode": "greedy", "preemption_mode": mode}
    short = [case for case in cases("llama") if len(case["prompt_token_ids"]) < 100] * 4
    with Engine(model=str(tiny_model("llama")), **options) as engine:
        outputs = engine.generate([{"prompt_token_ids": case["prompt_token_ids"]} for case in short], greedy())
        stats = engine.stats()
    assert [output.token_ids for output in outputs] == [case["greedy_token_ids"] for case in short]
    assert {"recompute": stats.num_preemptions_recompute, "swap": stats.num_preemptions_swap}[mode] > 0
    assert stats.num_free_kv_blocks == stats.num_kv_blocks == 12


def test_random_requests_leave_nothing_behind() -> None:
    with Engine(model=str(tiny_model("gpt2")), **OPTIONS) as engine:
        for _ in engine.stream({"prompt_token_ids": [1, 2, 3]}, greedy(200)):
            break
        engine.generate(prompts("gpt2") * 4, greedy(20))
        stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
