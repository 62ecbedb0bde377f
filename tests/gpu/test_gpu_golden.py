"""The default model on a GPU against its golden outputs, and long contexts against the CPU.

In float32 the tokens are the golden ones. In the 16-bit types the golden tokens are given (teacher forcing) and their
log-probabilities compared; transformers on a CPU differs by mean 0.023 and max 0.175 in bfloat16, 0.0027 and 0.021 in
float16.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_data import greedy_prompts, tiny_model

from cupy_engine import Engine, SamplingParams
from cupy_engine.model_source import DEFAULT_MODEL, ModelFiles

pytestmark = pytest.mark.gpu

CASES = greedy_prompts()
BOUNDS = {"bfloat16": (0.03, 0.25), "float16": (0.005, 0.04)}  # mean, max of |Δ logprob|


def greedy(num_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, **options)


def forced(case: dict[str, Any]) -> dict[str, list[int]]:
    return {"prompt_token_ids": case["prompt_token_ids"] + case["greedy_token_ids"]}


def golden_logprobs(case: dict[str, Any]) -> list[float]:
    return [position[0][1] for position in case["top5_logprobs"]]


def forced_logprobs(output: Any, num_tokens: int) -> list[Any]:
    assert output.prompt_logprobs is not None
    return list(output.prompt_logprobs[-num_tokens:])


@pytest.fixture(scope="module", params=sorted(BOUNDS))
def engine(request: pytest.FixtureRequest, default_model: ModelFiles) -> Any:
    with Engine(model=DEFAULT_MODEL, device="cuda", dtype=request.param, num_kv_blocks=4096) as engine:
        yield engine


def check_against_golden(dtype: str, outputs: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    errors, num_agreeing, num_positions = [], 0, 0
    for case, output in zip(CASES, outputs, strict=True):
        entries = forced_logprobs(output, len(case["greedy_token_ids"]))
        errors += [abs(e.logprob - g) for e, g in zip(entries, golden_logprobs(case), strict=True)]
        num_agreeing += sum(e.rank == 1 for e in entries)
        num_positions += len(entries)
    with capsys.disabled():
        print(f"\n{dtype}: mean {np.mean(errors):.4f} max {np.max(errors):.4f} argmax {num_agreeing}/{num_positions}")
    mean, maximum = BOUNDS[dtype]
    assert np.mean(errors) <= mean
    assert np.max(errors) <= maximum


def test_teacher_forced_prefill(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = engine.generate([forced(case) for case in CASES], greedy(1, prompt_logprobs=0))
    check_against_golden(engine.config.dtype, outputs, capsys)


def test_batch_of_one_and_of_64_agree(engine: Engine) -> None:
    """The same requests alone, and all of them among 64: decode graphs of other sizes, other products."""
    mean, maximum = BOUNDS[engine.config.dtype]
    prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
    crowd = engine.generate(prompts * 5 + prompts[:4], greedy(24, logprobs=1))
    errors: list[float] = []
    for prompt, together in zip(prompts, crowd, strict=False):
        [alone] = engine.generate(prompt, greedy(24, logprobs=1))
        for a, b in zip(alone.logprobs, together.logprobs, strict=True):
            if a.token_id != b.token_id:  # from here on the texts differ
                break
            errors.append(abs(a.logprob - b.logprob))
    assert len(errors) > 200
    assert np.mean(errors) <= mean
    assert np.max(errors) <= maximum


@pytest.mark.parametrize("budget", [8192, 512])
def test_float32_runs_free(default_model: ModelFiles, budget: int) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_batched_tokens": budget}
    with Engine(model=DEFAULT_MODEL, num_kv_blocks=4096, **options) as engine:
        prompts = [{"prompt_token_ids": case["prompt_token_ids"]} for case in CASES]
        for _ in range(2):  # the second time from the prefix cache
            for case, output in zip(CASES, engine.generate(prompts, greedy(48)), strict=True):
                expected = case["greedy_token_ids"]
                assert output.token_ids[: len(expected)] == expected, case["name"]
        for case in CASES:
            [output] = engine.generate({"prompt_token_ids": case["prompt_token_ids"]}, greedy(48))
            expected = case["greedy_token_ids"]
            assert output.token_ids[: len(expected)] == expected, case["name"]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama with 33,000 positions."""
    folder: Path = tmp_path_factory.mktemp("long") / "llama"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 33_000}))
    return str(folder)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("dtype", "mean", "maximum"), [("float32", 2e-4, 2e-3), ("bfloat16", 0.0448, 0.5)])
def test_contexts_of_32k_tokens(long_model: str, dtype: str, mean: float, maximum: float) -> None:
    """The prompt's log-probabilities agree along all of it, and decoding goes on from its end.

    In bfloat16, transformers on a GPU differs by mean 0.0448 and max 0.5185 on the same prompt, at its end as much as
    at its beginning.
    """
    rng = np.random.default_rng(7)
    prompt = {"prompt_token_ids": rng.integers(3, 256, 32_700).tolist()}
    params = greedy(64, prompt_logprobs=0, logprobs=1)
    with (
        Engine(model=long_model, device="cuda", dtype=dtype, num_kv_blocks=2100) as gpu,
        Engine(model=long_model, device="cpu", num_kv_blocks=2100) as cpu,
    ):
        [ours], [theirs] = gpu.generate(prompt, params), cpu.generate(prompt, params)
    pairs = zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)
    errors = np.array([abs(a.logprob - b.logprob) for a, b in pairs])
    assert errors[-4096:].mean() <= 1.25 * errors[:4096].mean() + mean / 100
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        if a.token_id != b.token_id:
            assert dtype != "float32"
            break
        errors = np.append(errors, abs(a.logprob - b.logprob))
    assert errors.mean() <= mean
    assert errors.max() <= maximum
