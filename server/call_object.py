"""Reads ``{"name": "f", "arguments": {…}}`` character by character, whatever the order of its members."""

from __future__ import annotations

import json
from typing import Any, Literal

_ARGUMENTS = ("arguments", "parameters")
_FIRST_KEYS = ("name", "id", "type", *_ARGUMENTS)  # an object that begins with another one is an answer in JSON


class CallObject:
    """A call in the making.

    ``name`` is ``None`` until it has been read. ``is_broken``: this is no JSON object with such members.

    Args:
        name: if it stood outside: then the whole object is its arguments.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self.is_done = False
        self.is_broken = False
        self._is_all_arguments = name is not None
        self._key = "arguments" if self._is_all_arguments else ""
        self._expects: Literal["start", "key", "colon", "value", "comma"] = "value" if name is not None else "start"
        self._part: list[str] = []  # the key or value being read
        self._depth = 0  # inside of that value
        self._in_string = False
        self._is_escaped = False
        self._is_telling = False  # the value is an object of arguments: every character of it counts
        self._told: list[str] = []  # arguments that were not taken yet
        self._has_arguments = False

    def feed(self, text: str) -> int:
        """Read on; returns how many characters belong to the object."""
        for place, character in enumerate(text):
            if self.is_done or self.is_broken:
                return place
            was_telling = self._is_telling
            self._read(character)
            if was_telling or self._is_telling:
                self._told.append(character)
        return len(text)

    def take_arguments(self) -> str:
        """What has come of the arguments since the last time, as JSON."""
        if self.is_done and not self._has_arguments:
            self._told.append("{}")
            self._has_arguments = True
        text = "".join(self._told)
        self._told.clear()
        return text

    def _read(self, character: str) -> None:
        if self._in_string:
            self._read_string(character)
        elif self._expects == "value":
            self._read_value(character)
        else:
            self._read_between(character)

    def _read_string(self, character: str) -> None:
        self._part.append(character)
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 0:
                self._end_part()

    def _read_value(self, character: str) -> None:
        if self._depth == 0 and character in ",}":  # which end a number, true, false or null
            self._end_part()
            self._read_between(character)
            return
        if self._depth == 0 and character == "{" and self._key in _ARGUMENTS:
            self._is_telling = self._has_arguments = True
        self._part.append(character)
        self._in_string = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        if self._depth == 0 and character in "}]":
            self._end_part()

    def _read_between(self, character: str) -> None:
        match self._expects, character:
            case "start", "{":
                self._expects = "key"
            case "key", '"':
                self._part, self._in_string = [character], True
            case "colon", ":":
                self._expects, self._part = "value", []
            case "comma", ",":
                self._expects = "key"
            case (("comma" | "key"), "}"):
                self.is_done = True
            case _:
                self.is_broken = self.is_broken or not character.isspace()

    def _end_part(self) -> None:
        text, self._part = "".join(self._part), []
        if self._expects == "key":
            is_first, self._key, self._expects = not self._key, str(self._decoded(text)), "colon"
            self.is_broken = self.is_broken or (is_first and self._key not in _FIRST_KEYS)
            return
        if self._key == "name" and isinstance(name := self._decoded(text), str):
            self.name = name
        elif self._key == "name":
            self.is_broken = True
        elif self._key in _ARGUMENTS and not self._is_telling:
            self._take_unusual_arguments(text)
        self._is_telling, self._expects, self.is_done = False, "comma", self._is_all_arguments

    def _take_unusual_arguments(self, text: str) -> None:
        """Some models write their arguments into a string, or null where there are none."""
        arguments = self._decoded(text)
        if arguments is not None:
            self._has_arguments = True
            self._told.append(arguments if isinstance(arguments, str) else text.strip())

    def _decoded(self, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.is_broken = True
            return None
