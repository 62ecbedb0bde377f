"""One call in XML, read mark by mark as its text arrives.

Texts stand in a call as they are, and may look like its marks. Qwen's own parser and vLLM's end a value at the first
mark; here a mark counts only where calls have it:

</tool_call>     ends the call right after </function>, or after </parameter> if </function> was forgotten
<parameter=x>    ends a value right after </parameter>; if that was forgotten, at the beginning of a line, if x is a
                 parameter of the function that has not been given yet
<function=x>     in a value begins an example: all marks up to its </function> are part of the value

Nothing counts in a string of a value that is JSON by its schema. What has not ended when the answer has is read again
plainly: the first </tool_call> ends it, and there are no examples or strings.

What stays ambiguous: a text that is no example and has a whole end of a value in it, such as </parameter></function>
</tool_call> or </parameter><parameter=x>, is cut there. Grammars keep such texts from being written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .arguments import properties_of
from .call_form import Schema
from .xml_values import argument_of, may_be_text

MAX_NAME = 256
_MARK = re.compile(rf"<(?:(function|parameter)=([^<>\n]{{0,{MAX_NAME}}})|/(function|parameter|tool_call))>")
_MAX_MARK = len("<parameter=>") + MAX_NAME
_QUOTE = re.compile(r'\\.|"', re.DOTALL)

Mark = re.Match[str]


class CallReader:
    """Finds out where a call ends and what it says.

    Args:
        tools: by name the schemas of the functions' parameters.
        is_plain: read plainly, as said above.
    """

    def __init__(self, tools: Mapping[str, Schema], *, is_plain: bool) -> None:
        self.call: tuple[str, dict[str, Any]] | None = None  # name and arguments, if it has ended as one
        self._tools = tools
        self._is_plain = is_plain
        self._name: str | None = None
        self._properties: dict[str, Schema] = {}
        self._arguments: dict[str, Any] = {}
        self._value: _Value | None = None
        self._place = 0  # what comes before it is read
        self._closed, self._closed_from, self._closed_to = "", 0, 0  # the last mark, if it closes something

    def end_in(self, text: str) -> int | None:
        """Where the call ends that the text begins with; ``None`` if it does not yet. Longer texts go on from here."""
        for mark in _MARK.finditer(text, self._place):
            self._place = mark.end()
            if self._take(mark):
                return self._place
        begun = text.rfind("<", max(self._place, len(text) - _MAX_MARK))
        self._place = begun if begun >= 0 else len(text)
        return None

    def _take(self, mark: Mark) -> bool:
        """Whether the call ends with this mark."""
        opens, name, closes = mark.groups()
        before, self._closed = self._closed, ""
        if before and mark.string[self._closed_to : mark.start()].strip():
            before = ""  # it is not right before
        if self._name is None and opens == "function":
            self._name, self._properties = name, properties_of(self._tools.get(name, {}))
        elif self._name not in self._tools:
            return closes == "tool_call"
        elif self._value is not None and not self._is_plain and self._value.has(mark):
            pass
        elif closes == "tool_call":
            return self._end(mark, before)
        elif closes == "parameter" or closes == "function":
            self._closed, self._closed_from, self._closed_to = closes, mark.start(), mark.end()
            if self._value is not None and closes == "parameter":
                self._value.closed_at = mark.start()
        elif opens == "parameter" and (before == "parameter" or self._is_due(mark)):
            self._end_value(mark.string, mark.start())
            self._value = _Value(name, self._properties.get(name, {}), mark.end())
        return False

    def _is_due(self, mark: Mark) -> bool:
        """Whether another parameter begins here although the last one was not closed."""
        if self._value is None:
            return True
        is_first_in_line, name = mark.string[mark.start() - 1] == "\n", mark[2]
        return is_first_in_line and name in self._properties and name not in (self._value.key, *self._arguments)

    def _end(self, mark: Mark, before: str) -> bool:
        """``before``: what closes right before the mark ``</tool_call>``."""
        if before:
            self._end_value(mark.string, self._closed_from)
            self.call = str(self._name), self._arguments
        return bool(before) or self._is_plain or self._value is None

    def _end_value(self, text: str, end: int) -> None:
        if self._value is not None:
            self._arguments[self._value.key] = self._value.read(text, end)


class _Value:
    """An argument's value. Its text begins at ``start``."""

    def __init__(self, key: str, schema: Schema, start: int) -> None:
        self.key = key
        self.closed_at: int | None = None  # by the last </parameter>
        self._schema = schema
        self._start = start
        self._num_examples = 0  # one within another
        self._is_json = not may_be_text(schema)
        self._is_in_string = False
        self._quotes_from = start

    def has(self, mark: Mark) -> bool:
        """Whether the mark is of an example in it, or within a string of it. To be asked about every mark, in order."""
        if self._is_json and self._is_quoted(mark):
            return True
        opens, _, closes = mark.groups()
        if opens == "function":
            self._num_examples += 1
        elif closes == "function" and self._num_examples:
            self._num_examples -= 1
            return True
        return self._num_examples > 0

    def read(self, text: str, end: int) -> Any:
        """``end``: where it ends if it was not closed."""
        end = end if self.closed_at is None else self.closed_at
        return argument_of(text[self._start : end].removeprefix("\n").removesuffix("\n"), self._schema)

    def _is_quoted(self, mark: Mark) -> bool:
        num_quotes = _QUOTE.findall(mark.string, self._quotes_from, mark.start()).count('"')
        self._is_in_string ^= num_quotes % 2 == 1
        self._quotes_from = mark.start()
        return self._is_in_string
