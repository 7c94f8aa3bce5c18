"""Chat templates: rendered as transformers does, and harmless whatever they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from uq.chat import ChatTemplate, Message
from uq.errors import BundleError, UsageError
from uq.sandbox import answer

# What real templates use: white space control, loop controls, filters, tests, errors.
TEMPLATE = """{{ bos_token }}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- continue -%}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{ raise_exception('text only') }}
    {%- endif %}
    {% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\n' }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


def user(message: str) -> list[Message]:
    return [{"role": "user", "content": message}]


def chat_prompt(assets: dict[str, bytes], message: str) -> str:
    with ChatTemplate.from_assets(assets) as template:
        return template.render(user(message))


def config(template: object) -> dict[str, bytes]:
    data = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "chat_template": template}
    return {"tokenizer_config.json": json.dumps(data).encode()}


@pytest.mark.parametrize("message", ["Hello", "  two\nlines {{ 7 * 7 }} ", "<end_of_turn>", "世é"])
def test_a_template_renders_as_in_transformers(
    message: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_checkpoint() / "tokenizer.json"),
        bos_token="<bos>",
        eos_token="<eos>",
    )
    expected = oracle.apply_chat_template(
        [{"role": "user", "content": message}],
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat_prompt(config(TEMPLATE), message) == expected


def test_a_template_file_comes_before_the_configuration() -> None:
    assets = config("from the configuration") | {"chat_template.jinja": b"from the file"}
    assert chat_prompt(assets, "x") == "from the file"


def test_the_default_of_several_templates_is_taken() -> None:
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert chat_prompt(config(named), "x") == "b"


@pytest.mark.parametrize("assets", [{}, config(None), config([]), config([{"name": "other"}])])
def test_without_a_template_chat_is_refused(assets: dict[str, bytes]) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        chat_prompt(assets, "x")


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ undefined.attribute }}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% do messages.clear() %}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_broken_or_hostile_template_is_one_error(template: str) -> None:
    with pytest.raises(BundleError, match="^chat template: "):
        chat_prompt(config(template), "x")


@pytest.mark.parametrize("data", [b"{", b"[1]", b"\xff"])
def test_a_broken_configuration_is_named(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"^tokenizer_config\.json: "):
        chat_prompt({"tokenizer_config.json": data}, "x")


CONVERSATION: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": " two "},
    {"role": "user", "content": "three"},
]


def test_a_conversation_renders_as_in_transformers(tiny_checkpoint: Callable[..., Path]) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_checkpoint() / "tokenizer.json"), bos_token="<bos>"
    )
    expected = oracle.apply_chat_template(
        CONVERSATION, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    with ChatTemplate.from_assets(config(TEMPLATE)) as template:
        assert [template.render(CONVERSATION) for _ in range(2)] == [expected] * 2


# What templates of the newer families use besides: macros, namespaces, tools, dates, JSON.
TOOLS_TEMPLATE = """
{%- macro call(tool, depth=0) -%}
    {%- set seen = namespace(names=[], first=true) -%}
    {%- for key, value in tool['function']['parameters']['properties'] | dictsort -%}
        {%- if loop.index > 2 -%}{%- break -%}{%- endif -%}
        {%- set seen.names = seen.names + [key | upper] -%}
        {%- set seen.first = false -%}
    {%- endfor -%}
    {{ '  ' * depth }}{{ tool['function']['name'] }}({{ seen.names | join(', ') }})
{%- endmacro -%}
{{ bos_token }}{{ strftime_now('%Y') | length }}
{%- if tools is not none and tools -%}
    {%- for tool in tools %}
{{ call(tool, depth=1) }} {{ tool | tojson }} {{ tool | tojson(indent=2, sort_keys=true) }}
    {%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- set content = message['content'] -%}
    {%- if content is iterable and content is not string -%}
        {%- set texts = content | selectattr('type', 'equalto', 'text') -%}
        {%- set content = texts | map(attribute='text') | join -%}
    {%- endif %}
<|turn>{{ message['role'] }}
{% generation %}{{ content | trim | replace('<', '\\u003c') }}{% endgeneration %}
{%- if message.get('tool_calls') %} {{ message.tool_calls[0].function.arguments | tojson(true) }}
{%- endif -%}
    <turn|>
{%- endfor -%}
{{ '<|turn>model\n' if add_generation_prompt }}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a <city>, 世é",
        "parameters": {"type": "object", "properties": {"place": {}, "day": {}, "unit": {}}},
    },
}
ARGUMENTS = {"place": "Zürich", "day": 1}
TOOL_MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": text} for text in (" How is ", "it?")]},
    {
        "role": "assistant",
        "content": "<b> I ask ",
        "tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "user", "content": "go on"},
]


@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_what_newer_templates_use_renders_as_in_transformers(
    tiny_checkpoint: Callable[..., Path], tools: list[dict[str, object]] | None
) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tiny_checkpoint() / "tokenizer.json"), bos_token="<bos>"
    )
    expected = oracle.apply_chat_template(
        TOOL_MESSAGES,
        tools=tools,
        chat_template=TOOLS_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    variables = {"messages": TOOL_MESSAGES, "tools": tools, "add_generation_prompt": True}
    assert answer(TOOLS_TEMPLATE, {**variables, "bos_token": "<bos>"}) == {"text": expected}
    assert ("weather(DAY, PLACE)" in expected) == (tools is not None)


def test_a_template_that_asks_for_tools_finds_none() -> None:
    source = "{{ 'no' if tools is none and documents is none else 'some' }} tools"
    with ChatTemplate.from_assets(config(source)) as template:
        assert template.render(user("hello")) == "no tools"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer",
        ),
        ("{{ 'a' * 10 ** 10 }}", "(MemoryError|longer)"),
        ("{{ '%1000000000d' % 1 }}", "(MemoryError|longer)"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "(longer|Recursion)"),
    ],
)
def test_a_template_that_eats_the_machine_is_stopped(template: str, reason: str) -> None:
    with (
        ChatTemplate(template, {}, seconds=0.5) as hostile,
        pytest.raises(BundleError, match=f"^chat template: .*{reason}"),
    ):
        hostile.render(user("x"))


def test_a_stopped_template_can_be_asked_again() -> None:
    slow = "{% if messages[0].content == 'x' %}{% for a in range(99999) %}"
    slow += "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}fine"
    with ChatTemplate(slow, {}, seconds=1) as template:
        with pytest.raises(BundleError, match="longer than 1 s"):
            template.render(user("x"))
        assert template.render(user("y")) == "fine"


def test_an_endless_template_is_refused_unread() -> None:
    with pytest.raises(BundleError, match="2000000 characters"):
        ChatTemplate("x" * 2_000_000, {})
