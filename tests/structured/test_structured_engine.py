"""Outputs that have the form asked for, from the default model at temperature 1, however steps are cut and run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cupy_engine import Engine, InvalidRequestError, SamplingParams, StructuredOutputs
from cupy_engine.outputs import RequestOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
PROMPT = "Describe a person, as JSON, please: "


@pytest.fixture(scope="module")
def engine(default_model: Any) -> Iterator[Engine]:
    """Few blocks and small steps: prompts come in chunks, sequences make room for each other."""
    with Engine(
        model=default_model.name,
        num_kv_blocks=24,
        max_model_len=192,
        max_num_seqs=12,
        max_num_batched_tokens=16,
        max_steps_in_flight=2,
        admission_mode="greedy",
    ) as engine:
        yield engine


def generate(engine: Engine, num_seeds: int, max_tokens: int = 90, **params: Any) -> list[RequestOutput]:
    settings = [
        SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed, **params) for seed in range(num_seeds)
    ]
    return engine.generate([PROMPT] * num_seeds, settings)


def texts_of(outputs: list[RequestOutput]) -> list[str]:
    completions = [completion for output in outputs for completion in output.outputs]
    assert {completion.finish_reason for completion in completions} == {"stop"}
    return [completion.text for completion in completions]


def test_json_follows_its_schema_while_others_run_free(engine: Engine) -> None:
    form = StructuredOutputs(json=PERSON)
    guided = [
        SamplingParams(temperature=1.0, max_tokens=90, seed=seed, n=2, structured_outputs=form) for seed in range(10)
    ]
    free = [SamplingParams(temperature=1.0, max_tokens=20, seed=seed, ignore_eos=True) for seed in range(6)]
    outputs = engine.generate([PROMPT] * 16, [*guided, *free])
    texts = texts_of(outputs[:10])
    for text in texts:
        person = json.loads(text)
        assert person.keys() == {"name", "age", "tags"}
        assert isinstance(person["name"], str)
        assert len(person["name"]) <= 10
        assert 0 <= person["age"] <= 130
        assert set(person["tags"]) <= {"a", "b", "c"}
    assert len(set(texts)) > 12, "seeds differ"
    assert all(len(output.token_ids) == 20 for output in outputs[10:])
    stats = engine.stats()
    assert stats.num_preemptions_recompute + stats.num_preemptions_swap > 0, "nobody had to make room"
    again = engine.generate([PROMPT], guided[3])
    assert [c.text for c in again[0].outputs] == [c.text for c in outputs[3].outputs], "a seed repeats them"


FORMS: dict[str, tuple[StructuredOutputs, Callable[[str], object]]] = {
    "regex": (StructuredOutputs(regex=r"\d{3}-[a-z]{2}"), lambda text: re.fullmatch(r"[0-9]{3}-[a-z]{2}", text)),
    "choice": (StructuredOutputs(choice=['"quoted"', "a\nb", "été 🦥"]), {'"quoted"', "a\nb", "été 🦥"}.__contains__),
    "lark": (StructuredOutputs(grammar='start: "<" /[ab]{2,4}/ ">"'), lambda text: re.fullmatch("<[ab]{2,4}>", text)),
    "gbnf": (StructuredOutputs(grammar='root ::= "x" ("y" | "z")'), {"xy", "xz"}.__contains__),
    "schema as text": (StructuredOutputs(json='{"enum": [1, [2], null]}'), lambda t: json.loads(t) in (1, [2], None)),
    "nothing": (StructuredOutputs(regex=""), lambda text: text == ""),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_way_to_ask(engine: Engine, name: str) -> None:
    form, is_right = FORMS[name]
    texts = texts_of(generate(engine, 4, structured_outputs=form))
    assert all(is_right(text) for text in texts), texts


def test_any_json_object_that_ends_is_one(engine: Engine) -> None:
    outputs = generate(engine, 6, max_tokens=60, structured_outputs=StructuredOutputs(json_object=True))
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_greedy_takes_the_likeliest_of_what_is_allowed(engine: Engine) -> None:
    params = SamplingParams(temperature=0, structured_outputs=StructuredOutputs(choice=["London", "Paris", "Rome"]))
    assert engine.generate("The capital of France is ", params)[0].text == "Paris"


def test_other_wishes_hold_too(engine: Engine) -> None:
    """Penalties, biases, bad words and stop strings beside a grammar."""
    form = StructuredOutputs(regex="[xyz]{6}")
    (output,) = engine.generate(PROMPT, SamplingParams(structured_outputs=form, bad_words=["y"], stop=["zz"], seed=1))
    assert re.fullmatch("[xyz]{0,6}", output.text)
    assert "zz" not in output.text


def test_bad_grammars_and_contradictions_are_refused_and_nothing_is_left(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
        engine.generate(PROMPT, SamplingParams(structured_outputs=StructuredOutputs(regex="(a")))
    assert caught.value.param == "structured_outputs"
    with pytest.raises(InvalidRequestError, match="leave no token to choose"):
        engine.generate(PROMPT, SamplingParams(structured_outputs=StructuredOutputs(regex="7+"), allowed_token_ids=[9]))
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_kv_blocks) == (0, 0, 24)


def test_a_model_without_a_tokenizer_refuses(tmp_path: Any) -> None:
    from golden_data import tiny_model

    params = SamplingParams(structured_outputs=StructuredOutputs(regex="a"))
    with Engine(model=str(tiny_model("llama"))) as tiny, pytest.raises(InvalidRequestError, match="no tokenizer"):
        tiny.generate({"prompt_token_ids": [1, 2]}, params)
