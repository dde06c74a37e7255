"""Chat templates render as transformers renders them, and cannot do anything but render."""

from __future__ import annotations

import msgspec
import pytest

from orcaserve.core.config import ModelError
from orcaserve.serve.chat_template import ChatTemplate, TemplateError
from orcaserve.serve.protocol import Tool

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße <&>\n"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go"},
]
SOURCE = """{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
{{ bos_token + messages[0].content | trim }}
{% else %}
    {% set rest = messages %}
{% endif %}
{% for message in rest %}
    {% if loop.index0 > 10 %}{% break %}{% endif %}
    {% generation %}
[{{ message['role'] | upper }}] {{ message.content | tojson }}
    {% endgeneration %}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}{{ mood }}{% if tools is not none %}!{% endif %}"""


def test_as_transformers_renders() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = ChatTemplate(SOURCE, {"bos_token": "<s>"}).render(MESSAGES, mood="calm")
    theirs, _ = render_jinja_template(
        conversations=[MESSAGES],
        chat_template=SOURCE,
        add_generation_prompt=True,
        bos_token="<s>",  # noqa: S106
        mood="calm",
    )
    assert ours == theirs[0]
    assert ours.startswith("<s>Be brief.")


def test_tools_are_written_as_transformers_writes_them() -> None:
    """Models have seen them in that order, and any other makes another prompt."""
    from transformers.utils.chat_template_utils import render_jinja_template

    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    source = "{{ tools | tojson }}"
    theirs, _ = render_jinja_template(
        [MESSAGES], tools=[{"type": "function", "function": function}], chat_template=source
    )
    for sent in ({"type": "function", "function": function}, {"function": function, "type": "function"}):
        shown = msgspec.to_builtins(msgspec.convert(sent, Tool))
        assert ChatTemplate(source, {}).render(MESSAGES, tools=[shown]) == theirs[0]


def test_a_template_says_what_it_does_not_take() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(TemplateError, match="roles must alternate"):
        template.render(MESSAGES)
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].content.nothing.at_all }}", {}).render(MESSAGES)
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include 'other' %}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_broken_template_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="does not compile"):
        ChatTemplate("{% if %}", {})
