"""``cupy-engine chat``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from cupy_engine.server.chat import Conversation
from cupy_engine.server.cli import main

from cupy_engine.errors import InvalidRequestError
from cupy_engine.outputs import CompletionDelta
from cupy_engine.sampling_params import SamplingParams

Captured = pytest.CaptureFixture[str]


class ScriptedEngine:
    """Says the words it is given; an exception among them is raised there."""

    info = SimpleNamespace(backend="script")

    def __init__(self, *words: str | BaseException) -> None:
        self.words = words
        self.prompts: list[Any] = []

    def stream(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[CompletionDelta]:
        self.prompts.append([dict(message) for message in messages])
        for word in self.words:
            if isinstance(word, BaseException):
                raise word
            yield CompletionDelta(0, word, [1])


def conversation(engine: ScriptedEngine, system: str | None = None) -> Conversation:
    return Conversation(engine, SamplingParams(), system)  # type: ignore[arg-type]


def test_what_was_said_is_remembered(capsys: Captured) -> None:
    engine = ScriptedEngine("Hi", " there")
    talk = conversation(engine, "Be nice.")
    talk.say("one")
    talk.say("two")
    assert capsys.readouterr().out == "Hi there\nHi there\n"
    assert [message["content"] for message in engine.prompts[1]] == ["Be nice.", "one", "Hi there", "two"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be nice."}]


def test_ctrl_c_stops_a_reply_and_keeps_the_conversation(capsys: Captured) -> None:
    talk = conversation(ScriptedEngine("Hi", KeyboardInterrupt(), " never"))
    talk.say("one")
    assert capsys.readouterr().out == "Hi [stopped]\n"
    assert talk.messages[-1] == {"role": "assistant", "content": "Hi"}


def test_a_conversation_too_long_says_the_way_out(capsys: Captured) -> None:
    talk = conversation(ScriptedEngine(InvalidRequestError("prompt", "prompt has 9 tokens")))
    talk.say("one")
    assert capsys.readouterr().err == "error: prompt has 9 tokens; /reset starts afresh\n"
    assert talk.messages == []


def test_piped(warm: None, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "What is the capital of France?\n\n/reset\nWhat is the capital of France?\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == "The capital of France is Paris.\n" * 2
    assert "never" not in err
