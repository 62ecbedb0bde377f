"""A conversation to the prompt text that a model was trained on, by the model's own Jinja template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cupy_engine.errors import InvalidRequestError, ModelLoadError
from cupy_engine.gguf_file import GGUFFile, read_gguf
from cupy_engine.json_file import read_json_object
from cupy_engine.model_source import ModelFiles
from cupy_engine.special_tokens import load_special_tokens

_DEFAULT, _WITH_TOOLS = "default", "tool_use"
_RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tools", "documents"})
_CUT = "\ue000cut here\ue001"  # private-use characters stand where the final message ends
_GGUF_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """Renders conversations. Safe to use from several threads at once.

    Args:
        templates: the template, or several by name: ``default``, and ``tool_use`` for requests with tools.
        special_tokens: role (``bos_token``) → text, variables of the template.
        file: where the template comes from, for errors.

    Raises:
        ModelLoadError: a template has a syntax error.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        file: Path | None = None,
    ) -> None:
        from jinja2 import TemplateSyntaxError

        from cupy_engine.template_sandbox import TemplateSandbox

        self._sandbox = TemplateSandbox()
        self._special_tokens = dict(special_tokens)
        texts = {_DEFAULT: templates} if isinstance(templates, str) else templates
        self.text_with_tools = texts.get(_WITH_TOOLS) or texts.get(_DEFAULT, "")
        try:
            self._templates = {name: self._sandbox.compile_text(text) for name, text in texts.items()}
        except (TemplateSyntaxError, RecursionError) as error:
            raise ModelLoadError(f"the chat template is broken: {error}", file=file) from error

    def takes(self, variable: str) -> bool:
        """Whether the template for tools mentions a variable, such as ``tools`` or ``documents``."""
        return bool(re.search(rf"\b{variable}\b", self.text_with_tools))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation. Tokenize it without special tokens: the template has put them in.

        Args:
            messages: each with a ``role`` and a ``content``, a string or a list of ``{"type": "text", "text": ...}``.
            add_generation_prompt: end with the beginning of the assistant's answer.
            continue_final_message: end inside the final message, for the model to go on with it.
            tools, documents, kwargs: further variables of the template.

        Raises:
            InvalidRequestError: the messages are malformed, or the template refuses them, takes more than 5 s or
                gives more than 16 Mi characters.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message",
                "continue_final_message cannot go with add_generation_prompt: set one to false",
            )
        if reserved := sorted(_RESERVED & kwargs.keys()):
            raise InvalidRequestError("chat_template_kwargs", f"chat_template_kwargs cannot set {', '.join(reserved)}")
        conversation = _conversation(messages)
        if continue_final_message:
            conversation[-1]["content"] = (conversation[-1]["content"] or "") + _CUT
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": conversation,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render(_WITH_TOOLS if tools else _DEFAULT, variables)
        return _cut(text) if continue_final_message else text

    def _render(self, name: str, variables: dict[str, Any]) -> str:
        from jinja2 import TemplateError

        from cupy_engine.template_sandbox import RenderLimitError

        template = self._templates.get(name) or self._templates[_DEFAULT]
        try:
            return self._sandbox.render_within_limits(template, variables)
        except RenderLimitError as error:
            raise InvalidRequestError("messages", f"rendering these messages {error}") from error
        except TemplateError as error:
            raise InvalidRequestError("messages", f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # an expression of the template failed on these messages
            reason = f"{type(error).__name__}: {error}"
            raise InvalidRequestError(
                "messages", f"the chat template cannot render these messages: {reason}"
            ) from error


def load_chat_template(files: ModelFiles) -> ChatTemplate | None:
    """The model's chat template, ``None`` if it has none.

    Raises:
        ModelLoadError: the template or its file is broken.
    """
    file = files.gguf or files.folder
    assert file is not None
    templates = _from_gguf(read_gguf(file)) if files.gguf else _from_folder(file)
    return ChatTemplate(templates, load_special_tokens(files), file) if _DEFAULT in templates else None


def _from_folder(folder: Path) -> dict[str, str]:
    jinja_file = folder / "chat_template.jinja"
    if jinja_file.is_file():
        try:
            return {_DEFAULT: jinja_file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot be read: {error}", file=jinja_file) from error
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        templates = _named(read_json_object(file).get("chat_template"), file) if file.is_file() else {}
        if templates:
            return templates
    return {}


def _named(value: Any, file: Path) -> dict[str, str]:
    """One template, or a list of ``{"name": ..., "template": ...}``."""
    match value:
        case None:
            return {}
        case str():
            return {_DEFAULT: value}
        case list() if all(isinstance(item, dict) for item in value):
            named = {item.get("name"): item.get("template") for item in value}
            if all(isinstance(text, str) for pair in named.items() for text in pair):
                return named
    raise ModelLoadError("field chat_template: must be a string or a list of objects with name and template", file=file)


def _from_gguf(gguf: GGUFFile) -> dict[str, str]:
    keys = {_GGUF_KEY: _DEFAULT, f"{_GGUF_KEY}.{_WITH_TOOLS}": _WITH_TOOLS}
    found = {name: gguf.metadata.get(key) for key, name in keys.items()}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our own copy, contents as strings."""
    if not messages:
        raise InvalidRequestError("messages", "messages is empty: give at least one")
    return [_message(index, message) for index, message in enumerate(messages)]


def _message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError("messages", f"messages[{index}] must be an object with a role and a content")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of_part(f"messages[{index}].content[{i}]", part) for i, part in enumerate(content))
    if content is not None and not isinstance(content, str):
        raise InvalidRequestError("messages", f"messages[{index}].content must be a string or a list of text parts")
    return {**message, "content": content}


def _text_of_part(where: str, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequestError(
        "messages", f'{where} must be {{"type": "text", "text": ...}}; this model reads text only'
    )


def _cut(text: str) -> str:
    end = text.rfind(_CUT)
    if end < 0:
        raise InvalidRequestError(
            "messages", "the chat template does not show the final message: it cannot be continued"
        )
    return text[:end]
