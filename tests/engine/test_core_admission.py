"""The core takes requests in by what it has measured of itself."""

from __future__ import annotations

import pytest
from golden_data import GOLDEN

from cupy_engine.config import EngineConfig
from cupy_engine.core import EngineCore
from cupy_engine.messages import AbortRequest, GenerateRequest
from cupy_engine.model_source import resolve_model
from cupy_engine.sampling_params import SamplingParams


@pytest.fixture
def core() -> EngineCore:
    model = str(GOLDEN / "tiny" / "llama")
    return EngineCore.from_config(
        EngineConfig(model=model, num_kv_blocks=32, max_num_seqs=2, slo_ttft_s=1e-6, device="cpu"), resolve_model(model)
    )


def request(name: str) -> GenerateRequest:
    params = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.0)
    return GenerateRequest(request_id=name, prompt_token_ids=[3, 4, 5], params=params)


def fill(core: EngineCore) -> None:
    """Two run; nothing is known yet about how fast they make room, so the third may wait."""
    for name in "abc":
        assert core.add(request(name)) is None
    for _ in range(3):
        core.step()


def test_a_full_engine_refuses_who_would_wait(core: EngineCore) -> None:
    fill(core)
    assert core.load().num_free == 0
    refusal = core.add(request("d"))
    assert refusal is not None
    assert (refusal.error_kind, refusal.finish_reason) == ("slo_ttft", "error")
    assert refusal.retry_after_s is not None


def test_an_engine_that_has_become_idle_takes_requests_again(core: EngineCore) -> None:
    fill(core)
    for name in "abc":
        core.abort(AbortRequest(request_id=name))
    assert core.load().num_free == 2
    assert [core.add(request(name)) for name in "de"] == [None, None]
    assert core.add(request("f")) is not None, "two of two seats are spoken for"
