"""Chat templates: rendered as transformers does, and harmless whatever they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from uq.chat import chat_prompt
from uq.errors import BundleError, UsageError

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
