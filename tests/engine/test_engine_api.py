"""The Python API as its users call it, on the default model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from cupy_engine import (
    ConfigError,
    DeadlineExceededError,
    Engine,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    SamplingParams,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def engine(default_model_name: str) -> Iterator[Engine]:
    with Engine(model=default_model_name, max_num_seqs=32) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _nothing_left_behind(engine: Engine) -> Iterator[None]:
    yield
    for _ in range(100):
        stats = engine.stats()
        if stats.num_running == stats.num_waiting == 0:
            break
        time.sleep(0.02)
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_kv_blocks == stats.num_kv_blocks


def test_generate_text_and_ids_give_the_same(engine: Engine) -> None:
    assert engine.frontend.tokenizer is not None
    ids = engine.frontend.tokenizer.encode("Once upon a time")
    by_text, by_ids = engine.generate(["Once upon a time", {"prompt_token_ids": ids}], GREEDY)
    assert by_text.text.startswith(", the city of Nova Haven")
    assert (by_text.text, by_text.token_ids) == (by_ids.text, by_ids.token_ids)
    assert by_text.finish_reason == "length"
    assert by_text.prompt == "Once upon a time"
    assert by_ids.prompt is None
    assert by_ids.prompt_token_ids == ids


def test_chat(engine: Engine) -> None:
    [output] = engine.chat(QUESTION, GREEDY)
    assert output.text == "The capital of France is Paris."
    assert output.finish_reason == "stop"


def test_many_conversations_keep_their_order(engine: Engine) -> None:
    topics = ["France", "the sea", "France", "cats"]
    many = [[{"role": "user", "content": f"Write one line about {topic}."}] for topic in topics]
    alone = [engine.chat(messages, GREEDY)[0].text for messages in many]
    assert [o.text for o in engine.chat(many, GREEDY)] == alone
    assert len(set(alone)) == 3


def test_stream_is_generate_in_pieces(engine: Engine) -> None:
    [whole] = engine.generate("The meaning of life is", GREEDY)
    deltas = list(engine.stream("The meaning of life is", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas][-1] == "length"
    assert all(d.finish_reason is None for d in deltas[:-1])


def test_leaving_a_stream_frees_its_blocks(engine: Engine) -> None:
    for _ in engine.stream("Once upon a time", SamplingParams(max_tokens=None, ignore_eos=True)):
        break  # the fixture sees that nothing is left


def test_one_prompt_is_forked_into_n(engine: Engine) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=7, max_tokens=16)
    [first] = engine.generate("Once upon a time", params)
    [second] = engine.generate("Once upon a time", params)
    texts = [o.text for o in first.outputs]
    assert [o.index for o in first.outputs] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [o.text for o in second.outputs]


def test_seed_does_not_depend_on_neighbours(engine: Engine) -> None:
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=11, max_tokens=16)
    [alone] = engine.generate("The lighthouse keeper", params)
    others = SamplingParams(temperature=1.3, max_tokens=24)
    prompts = ["A B C", "The lighthouse keeper", "def main():", "In 1969"]
    crowd = engine.generate(prompts, [others, params, others, others])
    assert crowd[1].token_ids == alone.token_ids


def test_best_of_returns_the_likeliest(engine: Engine) -> None:
    params = SamplingParams(n=1, best_of=4, temperature=1.2, seed=3, max_tokens=8)
    every = SamplingParams(n=4, temperature=1.2, seed=3, max_tokens=8, logprobs=0)
    [best] = engine.generate("Once upon a time", params)
    [all_four] = engine.generate("Once upon a time", every)

    def mean(output: object) -> float:
        return output.cumulative_logprob / len(output.token_ids)  # type: ignore[attr-defined]

    assert len(best.outputs) == 1
    assert best.token_ids == max(all_four.outputs, key=mean).token_ids


def test_stop_string_ends_and_is_cut(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, stop=["thriving"])
    [output] = engine.generate("Once upon a time", params)
    assert output.text == ", the city of Nova Haven was a "
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", "thriving")


def test_stop_token_id_is_reported(engine: Engine) -> None:
    [free] = engine.generate("Once upon a time", GREEDY)
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=[free.token_ids[4]])
    [output] = engine.generate("Once upon a time", params)
    assert output.token_ids == free.token_ids[:5]
    assert output.outputs[0].stop_reason == free.token_ids[4]


def test_min_tokens_and_ignore_eos(engine: Engine) -> None:
    at_least, endless = engine.chat(
        [QUESTION, QUESTION],
        [
            SamplingParams(temperature=0.0, max_tokens=20, min_tokens=15),
            SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True),
        ],
    )
    assert len(at_least.token_ids) >= 15
    assert (len(endless.token_ids), endless.finish_reason) == (20, "length")


def test_logit_bias_and_allowed_tokens(engine: Engine) -> None:
    [biased] = engine.generate("Once", SamplingParams(temperature=0.0, max_tokens=3, logit_bias={1234: 100.0}))
    assert biased.token_ids == [1234] * 3
    [allowed] = engine.generate("Once", SamplingParams(max_tokens=8, allowed_token_ids=[5000, 6000]))
    assert set(allowed.token_ids) <= {5000, 6000}


def test_bad_words_do_not_appear(engine: Engine) -> None:
    [output] = engine.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=12, bad_words=["city"]))
    assert "city" not in output.text


def test_truncated_prompt(engine: Engine) -> None:
    [output] = engine.generate("one two three four", SamplingParams(max_tokens=1, truncate_prompt_tokens=2))
    assert len(output.prompt_token_ids) == 2


def test_async_requests_run_together(engine: Engine) -> None:
    async def both() -> list[str]:
        outputs = await asyncio.gather(
            engine.generate_async("Once upon a time", GREEDY), engine.generate_async(QUESTION, GREEDY)
        )
        return [o.text for o in outputs]

    story, answer = asyncio.run(both())
    assert story.startswith(", the city")
    assert answer == "The capital of France is Paris."


def test_cancelling_an_async_request_aborts_it(engine: Engine) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(engine.generate_async("Once", SamplingParams(max_tokens=None, ignore_eos=True)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


def test_abort_by_id(engine: Engine) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    stream = engine.stream("Once", endless, request_id="to-abort")
    next(stream)
    engine.abort("to-abort")
    assert [d.finish_reason for d in stream][-1] == "abort"
    engine.abort("never-seen")


def test_many_threads(engine: Engine) -> None:
    texts: list[str] = []
    threads = [
        threading.Thread(target=lambda: texts.append(engine.generate("Once upon a time", GREEDY)[0].text))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 6
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("prompt", "param", "words"),
    [
        ("", "prompt", "empty"),
        ({"prompt_token_ids": []}, "prompt", "empty"),
        ({"prompt_token_ids": [49152]}, "prompt", "0 to 49151"),
        ({"prompt_token_ids": [-1]}, "prompt", "0 to 49151"),
        ({"text": "x"}, "prompt", "prompt_token_ids"),
        (3, "prompts", "a prompt or several, got int"),
        ([3], "prompt", "text, token ids or a dict, got int"),
        (b"bytes", "prompts", "got bytes"),
        ({"prompt_token_ids": [1] * 8192}, "prompt", "8192"),
    ],
)
def test_bad_prompts(engine: Engine, prompt: object, param: str, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        engine.generate(prompt, GREEDY)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_params_must_match_prompts(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="2 sampling parameters for 1 prompts"):
        engine.generate(["a"], [GREEDY, GREEDY])


@pytest.mark.parametrize("params", [3, "greedy", {"max_tokens": 1}, [{"max_tokens": 1}]])
def test_params_of_a_wrong_type(engine: Engine, params: object) -> None:
    with pytest.raises(InvalidRequestError, match="params must be SamplingParams"):
        engine.generate(["a"], params)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="params must be SamplingParams"):
        engine.stream("a", params)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_must_be_finite(value: float) -> None:
    with pytest.raises(InvalidRequestError, match="temperature must be finite"):
        SamplingParams(temperature=value)


def test_a_tokenizer_that_is_not_there_is_named(default_model_name: str) -> None:
    with pytest.raises(ConfigError, match="tokenizer: no model 'nope'"):
        Engine(model=default_model_name, tokenizer="nope", num_kv_blocks=16)


@pytest.mark.parametrize("messages", [3, "hello", [3], {"role": "user", "content": "hello"}])
def test_conversations_of_a_wrong_type(engine: Engine, messages: object) -> None:
    with pytest.raises(InvalidRequestError, match="messages must be a list of messages"):
        engine.chat(messages, GREEDY)  # type: ignore[arg-type]


def test_more_sequences_than_seats(engine: Engine, default_model_name: str) -> None:
    with Engine(model=default_model_name, max_num_seqs=2, num_kv_blocks=16) as small:
        with pytest.raises(InvalidRequestError, match="max_num_seqs = 2"):
            small.generate("x", SamplingParams(n=3))
        [output] = small.generate("x", SamplingParams(n=2, seed=1, max_tokens=2))
        assert len(output.outputs) == 2


def test_context_length_ends_generation(default_model_name: str, engine: Engine) -> None:
    with Engine(model=default_model_name, max_model_len=20) as small:
        [output] = small.generate("Once upon a time", SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(output.prompt_token_ids) + len(output.token_ids) == 20
    assert output.finish_reason == "length"


def test_closed_engine_says_so(default_model_name: str, engine: Engine) -> None:
    small = Engine(model=default_model_name, num_kv_blocks=8)
    stream = small.stream("Once", SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    small.close()
    with pytest.raises(EngineError, match="shutting down"):
        list(stream)
    with pytest.raises(EngineDeadError):
        small.generate("x", GREEDY)
    small.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
        ({"max_num_seqs": 10**12}, "max_num_seqs"),
        ({"num_kv_blocks": 10**12, "device": "cpu"}, "num_kv_blocks"),
        ({"swap_space_bytes": 10**15, "num_kv_blocks": 16}, "swap_space_bytes"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": "bfloat16", "device": "cpu"}, "dtype"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size"),
        ({"max_model_len": 100000}, "max_model_len"),
        ({"max_model_len": 8192, "num_kv_blocks": 4}, "max_model_len"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"quantization": "gptq"}, "quantization"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy"),
    ],
)
def test_bad_options_name_the_field(default_model_name: str, options: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(model=default_model_name, **options)
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["no-such-model", "", "a" * 5000, "~nobody-by-this-name/model", "\0"])
def test_unknown_model(name: str) -> None:
    with pytest.raises(ModelLoadError, match="smollm2-135m"):
        Engine(model=name)


def test_deadline(engine: Engine) -> None:
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    request = engine.frontend.make_request("Once", endless, timeout_s=0.2)
    with pytest.raises(DeadlineExceededError):
        list(engine._stream(request, "Once"))
