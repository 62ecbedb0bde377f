"""Jinja for chat templates: no way out of the sandbox, a limit on time and on the size of what comes out.

Templates belong to the model's owner, the messages to anybody: a template may loop over them, so every loop and macro
asks the clock. (CVE-2025-61620, CVE-2025-62426 are what happens without.)
"""

from __future__ import annotations

import json
import time
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDER_S = 5.0
MAX_RENDERED_CHARS = 16 << 20
_MAX_REPEATED_ITEMS = 1 << 20
_MAX_INTEGER_BITS = 1 << 16

_deadline_s: ContextVar[float] = ContextVar("_deadline_s")


class RenderLimitError(Exception):
    """A template ran too long or made too much."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment that Hugging Face's templates are written for, with limits."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        del self.globals["lipsum"]

    def compile_text(self, text: str) -> jinja2.Template:
        """Compile a template, a look at the clock in each of its loops and macros.

        Raises:
            jinja2.TemplateSyntaxError: the text is no template.
        """
        tree = self.parse(text)
        bodies = [loop.body for loop in tree.find_all(nodes.For)] + [macro.body for macro in tree.find_all(nodes.Macro)]
        for body in bodies:
            check = nodes.Call(nodes.EnvironmentAttribute("check_deadline"), [], [], None, None)
            body.insert(0, nodes.ExprStmt(check, lineno=1).set_environment(self))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render_within_limits(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        """Render.

        Raises:
            RenderLimitError: it takes longer than ``MAX_RENDER_S`` or gives more than ``MAX_RENDERED_CHARS``.
            jinja2.TemplateError: the template refuses its variables.
            Exception: whatever else the template's expressions raise.
        """
        token = _deadline_s.set(time.monotonic() + MAX_RENDER_S)
        try:
            chunks: list[str] = []
            num_chars = 0
            for chunk in template.generate(variables):
                chunks.append(chunk)
                num_chars += len(chunk)
                if num_chars > MAX_RENDERED_CHARS:
                    raise RenderLimitError(f"gives more than {MAX_RENDERED_CHARS} characters")
                self.check_deadline()
            return "".join(chunks)
        finally:
            _deadline_s.reset(token)

    def check_deadline(self) -> None:
        """Called from compiled templates."""
        if time.monotonic() > _deadline_s.get():
            raise RenderLimitError(f"takes longer than {MAX_RENDER_S:g} s")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply and raise to powers, unless the result is huge."""
        if _size_of_result(operator, left, right):
            raise RenderLimitError(f"computes too large a value with {operator}")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only shows them."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _size_of_result(operator: str, left: Any, right: Any) -> bool:
    if operator == "**":
        return not isinstance(right, (int, float)) or _bits(left) * abs(right) > _MAX_INTEGER_BITS
    for value, count in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(count, int):
            return len(value) * count > _MAX_REPEATED_ITEMS
    return _bits(left) + _bits(right) > _MAX_INTEGER_BITS


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 64


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As Hugging Face's templates expect it: not escaped for HTML, keys in their order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
