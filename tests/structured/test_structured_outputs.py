"""What may be demanded of an output's form, before any model sees it."""

from __future__ import annotations

import json

import pytest

from cupy_engine import InvalidRequestError, SamplingParams, StructuredOutputs


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "got regex and choice"),
        ({"choice": []}, "1 to 1024 choices, got 0"),
        ({"choice": ["x"] * 1025}, "got 1025"),
        ({"choice": ["a", ""]}, "non-empty"),
        ({"choice": ["a", 5]}, "strings"),
    ],
    ids=str,
)
def test_contradictions(form: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        StructuredOutputs(**form, param="guided_x")
    assert caught.value.param == "guided_x"


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ({"json": "{"}, "not valid JSON"),
        ({"json": "[" * 100_000}, "not valid JSON"),
        ({"json": "[1]"}, "an object"),
        ({"json": nested(64)}, "at most 64 deep"),
        ({"json": json.dumps(nested(64))}, "at most 64 deep"),
        ({"json": {"const": "x" * (256 << 10)}}, "at most 262144 characters"),
        ({"regex": "x" * (256 << 10 | 1)}, "at most 262144 characters"),
        ({"grammar": "what is this"}, "neither in Lark's nor in GBNF's"),
        ({"grammar": "root ::= " + "(" * 5000}, "nested too deeply"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_read(form: dict[str, object], problem: str) -> None:
    with pytest.raises(InvalidRequestError, match=problem) as caught:
        StructuredOutputs(**form, param="guided_x").to_grammar()
    assert caught.value.param == "guided_x"
    assert str(caught.value).startswith("guided_x ")


def test_the_deepest_schema_is_fine() -> None:
    StructuredOutputs(json=nested(63)).to_grammar()


def test_an_output_of_a_form_ends_by_itself() -> None:
    with pytest.raises(InvalidRequestError, match="ignore_eos must be false with response_format") as caught:
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputs(regex="a", param="response_format"))
    assert caught.value.param == "ignore_eos"


def test_the_type_is_checked() -> None:
    with pytest.raises(InvalidRequestError, match="structured_outputs must be StructuredOutputs"):
        SamplingParams(structured_outputs={"regex": "a"})
