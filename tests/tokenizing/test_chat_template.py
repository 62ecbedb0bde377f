"""Chat templates: what they render, what they refuse, and that they cannot do harm."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from golden_data import greedy_prompts, tiny_model

from cupy_engine import template_sandbox
from cupy_engine.chat_template import ChatTemplate, load_chat_template
from cupy_engine.errors import InvalidRequestError, ModelLoadError
from cupy_engine.model_source import ModelFiles

GOLDEN = {prompt["name"]: prompt["prompt"] for prompt in greedy_prompts()}
CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "Hi"}


def render(template: str, messages: Any = (USER,), **options: Any) -> str:
    return ChatTemplate(template, {"bos_token": "<s>"}).render(messages, **options)


def refusal(template: str, messages: Any = (USER,), **options: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        render(template, messages, **options)
    return caught.value


@pytest.fixture(scope="module")
def smollm2(default_model: ModelFiles) -> ChatTemplate:
    template = load_chat_template(default_model)
    assert template is not None
    return template


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("chat-1", ["What is the capital of France?"]),
        ("chat-2", ["Write a haiku about the sea."]),
        ("chat-3", ["List three primary colors.", "Red, yellow and blue.", "And which two make green?"]),
        ("json-1", ["Give me a JSON object with the keys name and age for a person called Ada who is 36."]),
    ],
)
def test_golden_prompts(smollm2: ChatTemplate, name: str, turns: list[str]) -> None:
    roles = ["user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    assert smollm2.render(messages) == GOLDEN[name]


def test_generation_prompt_is_a_choice() -> None:
    assert render(CHATML) == "<user>Hi</user>\n<assistant>"
    assert render(CHATML, add_generation_prompt=False) == "<user>Hi</user>\n"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert render(CHATML, [{"role": "user", "content": parts}]) == "<user>one\ntwo</user>\n<assistant>"


def test_the_callers_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "one"}]}, {"role": "assistant", "content": "a"}]
    before = json.dumps(messages)
    render(CHATML, messages, add_generation_prompt=False, continue_final_message=True)
    assert json.dumps(messages) == before


class TestContinuing:
    MESSAGES = (USER, {"role": "assistant", "content": "The answer is "})

    def go_on(self, template: str, messages: Any = None) -> str:
        messages = messages or self.MESSAGES
        return render(template, messages, add_generation_prompt=False, continue_final_message=True)

    def test_ends_inside_the_final_message(self) -> None:
        assert self.go_on(CHATML) == "<user>Hi</user>\n<assistant>The answer is "

    def test_a_template_that_trims(self) -> None:
        assert self.go_on(CHATML.replace("['content']", "['content'] | trim")).endswith("<assistant>The answer is ")

    def test_a_final_message_that_appears_before(self) -> None:
        assert self.go_on(CHATML, [USER, USER]) == "<user>Hi</user>\n<user>Hi"

    def test_a_template_that_does_not_show_it(self) -> None:
        error = refusal(
            "{{ messages[0].content }}", self.MESSAGES, add_generation_prompt=False, continue_final_message=True
        )
        assert (error.param, str(error)) == (
            "messages",
            "the chat template does not show the final message: it cannot be continued",
        )

    def test_not_with_a_generation_prompt(self) -> None:
        assert refusal(CHATML, continue_final_message=True).param == "continue_final_message"


class TestVariables:
    def test_special_tokens_tools_documents_and_the_requests_own(self) -> None:
        template = "{{ bos_token }}|{{ tools }}|{{ documents[0].title }}|{{ mood }}"
        text = render(template, documents=[{"title": "T"}], mood="good")
        assert text == "<s>|None|T|good"

    def test_messages_cannot_be_replaced(self) -> None:
        with pytest.raises(InvalidRequestError, match="chat_template_kwargs cannot set messages"):
            ChatTemplate(CHATML).render([USER], messages=[])

    def test_tool_template_for_requests_with_tools(self) -> None:
        template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"})
        assert template.render([USER]) == "plain"
        assert template.render([USER], tools=[{"name": "search"}]) == "search"
        assert ChatTemplate("plain").render([USER], tools=[{"name": "search"}]) == "plain"

    def test_helpers_of_hugging_face(self) -> None:
        assert render("{{ {'b': 'é<', 'a': 1} | tojson }}") == '{"b": "é<", "a": 1}'
        assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
        assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
        assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
        assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"

    def test_blocks_leave_no_lines(self) -> None:
        assert render("{% if true %}\n  {% set x = 1 %}\n  a\n{% endif %}\n") == "  a\n"


class TestRefusals:
    def test_by_the_template(self) -> None:
        error = refusal("{{ raise_exception('roles must alternate') }}")
        assert error.param == "messages"
        assert str(error) == "the chat template refuses these messages: roles must alternate"

    @pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 // 0 }}", "{{ messages[7].content }}"])
    def test_by_an_expression(self, template: str) -> None:
        assert refusal(template).param == "messages"

    @pytest.mark.parametrize(
        ("messages", "where"),
        [
            ([], "messages is empty"),
            (["hello"], "messages[0] must be an object"),
            ([USER, {"content": "x"}], "messages[1] must be an object with a role"),
            ([{"role": 3, "content": "x"}], "messages[0] must be an object with a role"),
            ([{"role": "user", "content": 3}], "messages[0].content must be a string"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0] must be"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content[0] must be"),
        ],
    )
    def test_of_malformed_messages(self, messages: Any, where: str) -> None:
        error = refusal(CHATML, messages)
        assert error.param == "messages"
        assert where in str(error)


class TestSandbox:
    @pytest.mark.parametrize(
        "template",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ raise_exception.__globals__ }}",
            "{{ messages.append(1) }}",
            "{{ messages[0].update({'role': 'x'}) }}",
            "{{ cycler.__init__.__globals__.os.system('true') }}",
            "{{ self.__init__ }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
            "{{ '{0.__class__}'.format(1) }}",
            "{{ lipsum(n=10) }}",
        ],
    )
    def test_no_way_out(self, template: str) -> None:
        """Refused, or nothing there: an attribute that is hidden renders as one that does not exist."""
        try:
            shown = render(template)
        except InvalidRequestError as error:
            shown = str(error).replace("messages", "")
        assert not any(word in shown for word in ("class '", "root:", "builtins", "posix"))
        assert shown == "" or "the chat template" in shown

    @pytest.mark.parametrize(
        "template",
        [
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "{% macro f(n) %}{{ f(n + 1) if n < 40 }}{{ f(n + 1) if n < 40 }}{% endmacro %}{{ f(0) }}",
            "{% for a in range(9999) %}{% for b in range(9999) %}{% set x = a * b %}{% endfor %}{% endfor %}",
        ],
    )
    def test_time_limit(self, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.2)
        start_s = time.monotonic()
        error = refusal(template)
        assert time.monotonic() - start_s < 2
        assert (error.param, str(error)) == ("messages", "rendering these messages takes longer than 0.2 s")

    @pytest.mark.parametrize(
        "template",
        [
            "{{ 'a' * 10000000000 }}",
            "{{ 10000000000 * [1] }}",
            "{{ 10 ** (10 ** 10) }}",
            "{{ 2 ** messages }}",
            "{{ (10 ** 4000) * (10 ** 19000) }}",
        ],
    )
    def test_size_limits(self, template: str) -> None:
        assert "rendering these messages" in str(refusal(template))

    def test_length_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(template_sandbox, "MAX_RENDERED_CHARS", 10_000)
        assert len(render("{% for a in range(10000) %}x{% endfor %}")) == 10_000
        error = refusal("{% for a in range(10001) %}x{% endfor %}")
        assert str(error) == "rendering these messages gives more than 10000 characters"

    def test_ordinary_arithmetic_passes(self) -> None:
        assert render("{{ '=' * 3 }}{{ 6 * 7 }}{{ 2 ** 10 }}{{ 1.5 * 2 }}{{ 2 ** -1 }}") == "===4210243.00.5"

    def test_endless_recursion(self) -> None:
        assert refusal("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").param == "messages"

    def test_many_messages_are_fast(self) -> None:
        messages = [USER] * 5000
        start_s = time.monotonic()
        render(CHATML, messages)
        assert time.monotonic() - start_s < 2


class TestFiles:
    def load(self, folder: Path) -> str | None:
        template = load_chat_template(ModelFiles("model", folder=folder))
        return template and template.render([USER], tools=[{}])

    def test_none(self, tmp_path: Path) -> None:
        assert self.load(tmp_path) is None
        assert load_chat_template(ModelFiles("llama", folder=tiny_model("llama"))) is None
        (tmp_path / "tokenizer_config.json").write_text("{}")
        assert self.load(tmp_path) is None

    def test_tokenizer_config_with_special_tokens(self, tmp_path: Path) -> None:
        config = {
            "chat_template": "{{ bos_token }}{{ eos_token }}",
            "bos_token": "<s>",
            "eos_token": {"content": "</s>"},
        }
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert self.load(tmp_path) == "<s></s>"

    def test_a_list_of_named_templates(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
        assert self.load(tmp_path) == "tools"

    def test_order_of_the_files(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "third"}))
        assert self.load(tmp_path) == "third"
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "second"}))
        assert self.load(tmp_path) == "second"
        (tmp_path / "chat_template.jinja").write_text("first é", encoding="utf-8")
        assert self.load(tmp_path) == "first é"

    @pytest.mark.parametrize("template", [3, {"a": "b"}, [3], [{"name": "default"}], [{"template": "x"}]])
    def test_nonsense_names_the_file(self, tmp_path: Path, template: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json: field chat_template"):
            self.load(tmp_path)

    @pytest.mark.parametrize("template", ["{% for %}", "{{", "{% unknown %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
    def test_a_broken_template(self, tmp_path: Path, template: str) -> None:
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ModelLoadError, match="the chat template is broken"):
            self.load(tmp_path)

    def test_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(ModelLoadError, match=r"chat_template\.jinja: cannot be read"):
            self.load(tmp_path)
