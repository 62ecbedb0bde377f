"""What an engine counts, exactly, over a run of the real core; and the page that workers make of it."""

from __future__ import annotations

import itertools
import re

import pytest
from cupy_engine.server.gpu_monitor import GpuUse
from cupy_engine.server.metrics_page import EngineView, render
from golden_data import GOLDEN
from prometheus_client.parser import text_string_to_metric_families

from cupy_engine.config import EngineConfig
from cupy_engine.core import EngineCore
from cupy_engine.live_view import MAX_BLOCKS
from cupy_engine.messages import (
    AbortRequest,
    EngineStats,
    GenerateRequest,
    HistogramCounts,
    Metric,
    StatsReply,
    StatsRequest,
)
from cupy_engine.metrics import Histogram
from cupy_engine.model_source import resolve_model
from cupy_engine.sampling_params import SamplingParams

NAMES_OF_VLLM = re.findall(
    r"\w+",
    """
    num_requests_running num_requests_waiting num_requests_swapped kv_cache_usage_perc prefix_cache_queries
    prefix_cache_hits num_preemptions prompt_tokens prompt_tokens_cached generation_tokens iteration_tokens_total
    time_to_first_token_seconds inter_token_latency_seconds request_time_per_output_token_seconds
    e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds
    request_success request_prompt_tokens request_generation_tokens request_params_n request_params_max_tokens
    admission_rejections deadline_exceeded spec_decode_num_drafts spec_decode_num_draft_tokens
    spec_decode_num_accepted_tokens gpu_utilization_perc gpu_memory_used_bytes engine_restarts step_duration_seconds
    host_overhead_seconds
""",
)


@pytest.fixture
def core() -> EngineCore:
    model = str(GOLDEN / "tiny" / "llama")
    config = EngineConfig(model=model, num_kv_blocks=32, max_num_seqs=4, max_queue_len=2, device="cpu")
    return EngineCore.from_config(config, resolve_model(model))


def request(name: str, num_prompt: int, **params: object) -> GenerateRequest:
    wanted = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "temperature": 0.0} | params)
    return GenerateRequest(request_id=name, prompt_token_ids=list(range(3, 3 + num_prompt)), params=wanted)


def test_how_many_requests_meet_the_targets() -> None:
    model = str(GOLDEN / "tiny" / "llama")
    for limit_s, met, missed in ((60.0, 1, 0), (1e-9, 0, 1)):
        config = EngineConfig(model=model, num_kv_blocks=32, slo_ttft_s=limit_s, slo_tpot_s=limit_s, device="cpu")
        core = EngineCore.from_config(config, resolve_model(model))
        core.add(request("a", 3))
        run(core)
        found = metrics(core)
        assert found["slo_met"].values == {"ttft": met, "tpot": met}
        assert found["slo_missed"].values == {"ttft": missed, "tpot": missed}


def run(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def metrics(core: EngineCore) -> dict[str, Metric]:
    return {metric.name: metric for metric in core.metrics.snapshot(core.scheduler)}


def count(metric: Metric) -> int:
    assert metric.histogram is not None
    return sum(metric.histogram.counts)


def total(metric: Metric) -> float:
    assert metric.histogram is not None
    return metric.histogram.sum


def test_counts_of_a_run(core: EngineCore) -> None:
    core.add(request("a", 33))
    run(core)
    core.add(request("b", 33, n=2, max_tokens=3))
    run(core)
    found = metrics(core)
    assert found["prompt_tokens"].values == {"": 66}
    assert found["prompt_tokens_cached"].values == found["prefix_cache_hits"].values == {"": 32}
    assert found["prefix_cache_queries"].values == {"": 66}
    assert found["generation_tokens"].values == {"": 4 + 2 * 3}
    assert found["request_success"].values == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    assert total(found["request_generation_tokens"]) == 10
    assert total(found["request_params_n"]) == 3
    assert total(found["request_params_max_tokens"]) == 7
    assert total(found["iteration_tokens_total"]) == 33 + 3 + 1 + 2 * 2
    assert count(found["inter_token_latency_seconds"]) == 3 + 2 * 2
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert count(found[name + "_seconds"]) == 2, name
    assert count(found["step_duration_seconds"]) == count(found["host_overhead_seconds"]) == 7
    assert found["kv_cache_usage_perc"].values == {"": 0}


def test_refusals_aborts_and_deadlines(core: EngineCore) -> None:
    assert core.add(request("empty", 0))
    for name in "ab":
        assert core.add(request(name, 3)) is None
    assert core.add(request("c", 3))
    core.abort(AbortRequest(request_id="a"))
    late = request("late", 3)
    late.deadline_s = 1e-9
    core.add(late)
    run(core)
    found = metrics(core)
    assert found["admission_rejections"].values == {"queue_full": 1, "invalid": 1, "slo_ttft": 0, "key_limit": 0}
    assert found["deadline_exceeded"].values == {"": 1}
    assert found["request_success"].values == {"stop": 0, "length": 1, "abort": 1, "error": 1}


def test_drafts(core: EngineCore) -> None:
    core.metrics.on_draft(4, 3)
    core.metrics.on_draft(4, 0)
    found = metrics(core)
    names = ("drafts", "draft_tokens", "accepted_tokens")
    assert [found[f"spec_decode_num_{name}"].values[""] for name in names] == [2, 8, 3]


def test_histogram_counts_its_bounds_in() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0, 1, 1.5, 2, 4, 5, 100):
        histogram.observe(value)
    assert histogram.snapshot() == HistogramCounts((1, 2, 4), [2, 2, 1, 2], 113.5)


def test_live_view(core: EngineCore) -> None:
    core.add(request("a", 33))
    core.add(request("b", 33, n=2))
    core.step()
    core.step()
    from cupy_engine.live_view import live_view

    view = live_view(core.scheduler)
    assert view.num_prefilling == 0
    assert [(s.num_prompt, s.num_output) for s in view.sequences] == [(33, 2)] * 3
    assert len(view.blocks) == 32
    assert view.blocks_step == 1
    used = [int(mark) for mark in view.blocks if mark.isdigit()]
    assert sum(used) == 3 * 3
    run(core)
    assert set(live_view(core.scheduler).blocks) == {".", "c"}


def test_live_view_of_a_large_pool_is_a_sample() -> None:
    from cupy_engine.block_manager import BlockManager
    from cupy_engine.live_view import live_view

    class LargeScheduler:
        block_manager = BlockManager(10 * MAX_BLOCKS + 1, 16)
        running = ()

    view = live_view(LargeScheduler())  # type: ignore[arg-type]
    assert view.blocks_step == 11
    assert len(view.blocks) <= MAX_BLOCKS


def test_page_has_every_metric_and_parses(core: EngineCore) -> None:
    core.add(request("a", 5))
    run(core)
    gpus = [GpuUse("0000:01:00.0", 0.5, 1 << 30)]
    reply = StatsReply(token=StatsRequest(token=1).token, stats=core.stats(), metrics=list(metrics(core).values()))
    views = [
        EngineView("m", reply=reply, gpus=gpus, num_restarts=2),
        EngineView("m", "1", reply=reply),
        EngineView("other", state="loading"),
    ]
    families = {family.name: family for family in text_string_to_metric_families(render(views).decode())}
    assert {"cupy_engine:" + name for name in NAMES_OF_VLLM} <= families.keys()
    running = families["cupy_engine:num_requests_running"].samples
    assert [sample.labels for sample in running] == [{"model_name": "m", "engine": each} for each in "01"]
    up = {sample.labels["model_name"]: sample.value for sample in families["cupy_engine:engine_up"].samples}
    assert up == {"m": 1, "other": 0}
    assert families["cupy_engine:engine_restarts"].samples[0].value == 2
    assert families["cupy_engine:gpu_utilization_perc"].samples[0].value == 0.5
    for family in families.values():
        assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            check_histogram([s for s in family.samples if s.labels["engine"] == "0"])


def check_histogram(samples: list) -> None:
    buckets = [sample.value for sample in samples if "le" in sample.labels]
    assert all(low <= high for low, high in itertools.pairwise(buckets))
    (number,) = [sample.value for sample in samples if sample.name.endswith("_count")]
    assert buckets[-1] == number


def test_labels_are_escaped() -> None:
    page = render([EngineView('a"b\n\\c')]).decode()
    assert re.search(r'engine_up\{engine="0",model_name="a\\"b\\n\\\\c"\} 1.0', page)


def test_no_engine_answers() -> None:
    page = render([EngineView("m", state="dead", reply=None)]).decode()
    assert 'engine_up{engine="0",model_name="m"} 0.0' in page
    assert "num_requests_running" not in page


def test_stats_of_nothing() -> None:
    assert render([EngineView("m", reply=StatsReply(token=1, stats=EngineStats()))])
