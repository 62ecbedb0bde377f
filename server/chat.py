"""``cupy-engine chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

from cupy_engine.engine import Engine
from cupy_engine.errors import InvalidRequestError
from cupy_engine.sampling_params import SamplingParams

from .generate import Figures, make_engine, sampling_params

PROMPT = "> "


def chat(arguments: Namespace) -> int:
    """The command; its exit status."""
    params = sampling_params(arguments)
    is_terminal = sys.stdin.isatty()
    with make_engine(arguments) as engine:
        if engine.frontend.chat_template is None:
            raise InvalidRequestError(
                "model", f"model {engine.info.model_name} has no chat template; use generate --raw"
            )
        conversation = Conversation(engine, params, arguments.system)
        if is_terminal:
            import readline  # noqa: F401  line editing and history for input()

            sys.stdout.write(f"{engine.info.model_name} on {engine.info.backend}. /reset forgets, /quit leaves.\n")
        while (text := _read_line(is_terminal)) is not None:
            if text == "/reset":
                conversation.reset()
            elif text == "/quit":
                break
            elif text:
                conversation.say(text)
    return 0


class Conversation:
    """What has been said, and the way to say more."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None) -> None:
        self._engine = engine
        self._params = params
        self._opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._opening)

    def reset(self) -> None:
        self.messages = list(self._opening)

    def say(self, text: str) -> None:
        """Print the reply as it comes. Ctrl-C stops it; what was said until then is remembered."""
        self.messages.append({"role": "user", "content": text})
        figures, pieces = Figures(), list[str]()
        try:
            for delta in figures.watch(self._engine.stream(self.messages, self._params)):
                pieces.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
        except InvalidRequestError as error:
            self.messages.pop()
            sys.stderr.write(f"error: {error}; /reset starts afresh\n")
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        if sys.stderr.isatty():
            sys.stderr.write(f"\033[2m{figures.line(self._engine.info.backend)}\033[0m\n")


def _read_line(is_terminal: bool) -> str | None:
    """What the user says next, stripped; ``None`` at the end. Ctrl-C gives an empty line."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input(PROMPT).strip()
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return ""
    except EOFError:
        sys.stdout.write("\n")
        return None
