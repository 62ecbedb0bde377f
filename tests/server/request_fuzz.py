"""Requests that are mostly right: every field at its edges, in any company, so that many reach the engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

VOCAB_SIZE = 49152
_F = {"type": "function", "function": {"name": "f"}}
_ALLOWED = {"mode": "auto", "tools": [_F]}
Body = dict[str, Any]
Maker = Callable[[], Any]


class RequestFuzz:
    """Makes requests from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        one_of, some = self._one_of, self._some_ids
        self._common: dict[str, Maker] = {
            "max_tokens": one_of(1, 2, 5, 30, 300),
            "temperature": one_of(0, 0.5, 1, 100),
            "top_p": one_of(1e-9, 0.5, 1),
            "n": one_of(1, 2, 16),
            "stop": one_of("a", ["b", "c"], "\n"),
            "presence_penalty": one_of(-2, 2),
            "frequency_penalty": one_of(-2, 0.5),
            "repetition_penalty": one_of(0.01, 100),
            "logit_bias": lambda: {str(token_id): 100 - 2 * (token_id % 101) for token_id in some(30)},
            "seed": one_of(0, -1, 1 << 62),
            "top_k": one_of(-1, 1, 50, 10**6),
            "min_p": one_of(0, 0.5, 1),
            "min_tokens": one_of(0, 3),
            "stop_token_ids": lambda: some(5),
            "ignore_eos": one_of(True, False),
            "truncate_prompt_tokens": one_of(1, 5, 1000),
            "allowed_token_ids": lambda: some(self._random.choice([1, 100])),
            "bad_words": one_of(["a"], ["the cat", " x"], ["\0"]),
            "prompt_logprobs": one_of(0, 20),
            "return_token_ids": one_of(True),
            "timeout_s": one_of(0.001, 5),
            "stream": one_of(True, False),
            "guided_json": self._schema,
            "guided_regex": one_of("[a-z]{1,5}", "(a", r"\d+", "(?s:.){0,20}", ""),
            "guided_choice": one_of(["a", "b"], ["\1", '"\\'], ["é"]),
            "guided_grammar": one_of('root ::= "a"+', 'start: "b" | start "c"', "x"),
        }
        self._completion = self._common | {"logprobs": one_of(0, 20), "echo": one_of(True), "best_of": one_of(1, 3)}
        self._chat = self._common | {
            "logprobs": one_of(True),
            "top_logprobs": one_of(0, 3),
            "tools": lambda: [self._tool("f"), self._tool("g")],
            "tool_choice": one_of("none", "auto", "required", _F, {"type": "allowed_tools", "allowed_tools": _ALLOWED}),
            "parallel_tool_calls": one_of(True, False),
            "continue_final_message": one_of(True),
            "response_format": one_of({"type": "json_object"}, {"type": "text"}),
            "echo": one_of(True),
        }

    def request(self) -> tuple[str, Body]:
        """A path and a body."""
        share = self._random.choice([0.02, 0.06, 0.12])
        kind = self._random.random()
        if kind < 0.4:
            prompt = self._random.choice([self._text(), [self._text(), self._text()], self._some_ids(60)])
            return "/v1/completions", {"prompt": prompt, **self._pick(self._completion, share)}
        if kind < 0.8:
            chat = {"messages": self._messages(), "max_tokens": 20}
            return "/v1/chat/completions", chat | self._pick(self._chat, share)
        if kind < 0.9:
            options = {"dimensions": self._one_of(1, 64, 65), "pooling": self._one_of("mean", "last")}
            return "/v1/embeddings", {"input": self._text(), **self._pick(options, 0.3)}
        options = {"stream": self._one_of(True), "tools": lambda: [{"type": "function", "name": "f"}]}
        return "/v1/responses", {"input": self._text(), "max_output_tokens": 10, **self._pick(options, 0.4)}

    def _one_of(self, *values: Any) -> Maker:
        return lambda: self._random.choice(values)

    def _some_ids(self, count: int) -> list[int]:
        return [self._random.randrange(VOCAB_SIZE) for _ in range(count)]

    def _pick(self, makers: dict[str, Maker], share: float) -> Body:
        return {name: make() for name, make in makers.items() if self._random.random() < share}

    def _text(self) -> str:
        texts = ("a", "", "hello world " * 12, "é🦥\0\ud83e", "<|im_end|>", "\n" * 50, "a " * 400)
        return self._random.choice(texts)

    def _schema(self) -> Body:
        person = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}
        items = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
        return self._random.choice(
            [person, items, {"enum": ["x", 1]}, {"not": {}}, {"pattern": "["}, {"$ref": "#"}, {}]
        )

    def _tool(self, name: str) -> Body:
        strict = self._random.choice([None, False, True])
        return {"type": "function", "function": {"name": name, "parameters": self._schema(), "strict": strict}}

    def _messages(self) -> list[Body]:
        roles = ("user", "system", "assistant", "tool")
        messages = [
            {"role": self._random.choice(roles), "content": self._text()} for _ in range(self._random.randint(1, 3))
        ]
        if self._random.random() < 0.2:
            arguments = self._random.choice(["{}", "{", "[]", '{"a": 1}'])
            messages.append({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]})
        return messages
