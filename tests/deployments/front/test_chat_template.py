"""Chat templates against transformers' own rendering, and what a hostile one may not do."""

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deployments.front.chat_template import ChatTemplate, ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set messages = messages[1:] %}
{% else %}
    {% set system = '' %}
{% endif %}
{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}
    {% else %}
        {{ ' ' + message['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}
"""
TOOLS = """\
{%- macro describe(tool) %}{{ tool.function.name }}: {{ tool | tojson(indent=2) }}{% endmacro -%}
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for tool in tools or [] %}
    {%- if tool.function.name == 'hidden' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- describe(tool) + '\\n' }}
{%- endfor %}
{%- for document in documents or [] %}{{ document.title | upper }}|{% endfor %}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- call.function.name }}(
            {%- for k, v in call.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})
        {%- endfor %}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{ message.content }}{% endgeneration %}
    {%- else %}
        {{- '<' ~ message.role ~ '>' ~ message.content }}
    {%- endif %}
{%- endfor %}
{{- ns.count }}{{ ' think' if enable_thinking is defined and enable_thinking }}
{%- if add_generation_prompt %}>>{% endif %}
"""
PARTS = """\
{%- for message in messages %}
    {%- if message['content'] is string %}{{ message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image_url' %}<image>{% else %}[{{ part['text'] }}]{% endif %}
        {%- endfor %}
    {%- endif %};
{%- endfor %}
"""
ONLY_PARTS = """\
{%- for message in messages %}{% set content = message.content %}
    {%- for part in content | list %}({{ part.type }}:{{ part.text }}){% endfor %}
{%- endfor %}
"""

DIALOGUES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <b>brief</b> & 'kind'."}, {"role": "user", "content": " two\n\nlines  "}],
    [
        {"role": "user", "content": "größer? 😀"},
        {"role": "assistant", "content": "Ja.\n"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %} <|im_end|>"},
    ],
]
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"a": "<&'\">", "b": [1, 2.5, None]}}}


def theirs(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    rendered, _ = render_jinja_template([messages], chat_template=template, **{**TOKENS, **arguments})
    return rendered[0]


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOOLS, PARTS])
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(template: str, dialogue: list[dict[str, Any]], prompt: bool) -> None:
    ours = ChatTemplate(template, TOKENS).render(dialogue, add_generation_prompt=prompt)
    assert ours == theirs(template, dialogue, add_generation_prompt=prompt)


def test_tools_documents_and_further_variables() -> None:
    arguments: dict[str, Any] = {
        "tools": [TOOL, {"type": "function", "function": {"name": "hidden"}}],
        "documents": [{"title": "one"}],
    }
    ours = ChatTemplate(TOOLS, TOKENS).render(DIALOGUES[0], template_kwargs={"enable_thinking": True}, **arguments)
    assert ours == theirs(TOOLS, DIALOGUES[0], enable_thinking=True, add_generation_prompt=True, **arguments)
    assert '"<&\'\\">"' in ours
    assert "ONE|" in ours
    assert "größe" in ours
    assert ours.endswith("1 think>>")


def test_arguments_of_tool_calls_become_objects() -> None:
    """OpenAI's clients send them as JSON text, templates go through them as an object."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2]}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    ours = ChatTemplate(TOOLS, TOKENS).render([message])
    assert "add(a=[1, 2])" in ours
    assert call["function"]["arguments"] == '{"a": [1, 2]}', "the caller's messages are left alone"
    call["function"]["arguments"] = "{"
    with pytest.raises(ChatTemplateError, match="'add' are not JSON"):
        ChatTemplate(TOOLS, TOKENS).render([message])


@pytest.mark.parametrize("template", [CHATML, LLAMA2, PARTS])
@pytest.mark.parametrize("ending", ["Sure: 1,", "Sure: 1, "])
def test_the_final_message_is_left_open(template: str, ending: str) -> None:
    dialogue = [*DIALOGUES[0], {"role": "assistant", "content": ending}]
    ours = ChatTemplate(template, TOKENS).render(dialogue, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs(template, dialogue, continue_final_message=True)
    assert ours.rstrip().endswith("Sure: 1,")


def test_what_cannot_be_continued_is_refused() -> None:
    template = ChatTemplate(CHATML, TOKENS)
    for messages in ([], [{"role": "assistant", "content": None}], [{"role": "assistant"}]):
        with pytest.raises(ChatTemplateError, match="needs a final message"):
            template.render(messages, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="cannot both be true"):
        template.render(DIALOGUES[0], continue_final_message=True)
    with pytest.raises(ChatTemplateError, match="leaves out the final message"):
        ChatTemplate("fixed", TOKENS).render(DIALOGUES[0], add_generation_prompt=False, continue_final_message=True)


def test_content_parts_are_joined_for_templates_that_want_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    ours = ChatTemplate(CHATML, TOKENS).render([{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in ours
    with pytest.raises(ChatTemplateError, match="'image_url' is not supported"):
        ChatTemplate(CHATML, TOKENS).render([{"role": "user", "content": [{"type": "image_url"}]}])


def test_content_parts_reach_templates_that_take_them() -> None:
    content = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": "plain"}]
    assert ChatTemplate(PARTS, TOKENS).render(messages) == "<image>[what?];plain;"


def test_text_becomes_a_part_for_templates_that_take_nothing_else() -> None:
    assert ChatTemplate(ONLY_PARTS, TOKENS).render(DIALOGUES[0]) == "(text:Hi)"


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        ChatTemplate(LLAMA2, TOKENS).render([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (CHATML, [{"role": "user", "content": None}]),
        (CHATML, [{"role": "user", "content": 7}]),
        (CHATML, [{"content": "no role"}]),
        (CHATML, ["not an object"]),
        ("{{ 1 / 0 }}", []),
        ("{{ messages[0].a.b.c }}", []),
        ("{{ [1] | map('nothing') | list }}", []),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", []),
        ("{{ undefined_function() }}", []),
        ("{% include 'secrets' %}", []),
        (CHATML, [{"role": "user", "content": object()}]),
    ],
)
def test_failures_are_chat_template_errors(source: str, messages: list[Any]) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, TOKENS).render(messages)


def test_a_template_that_does_not_compile_fails_when_it_is_loaded() -> None:
    for source in ("{% if %}", "{{ a b }}", "{% nothing %}", "{{ 'a' | nofilter }}"):
        with pytest.raises(ChatTemplateError, match="does not compile"):
            ChatTemplate(source, TOKENS)


def test_template_kwargs_must_not_replace_the_conversation() -> None:
    with pytest.raises(ChatTemplateError, match="must not set add_generation_prompt, messages"):
        ChatTemplate(CHATML, TOKENS).render([], template_kwargs={"messages": [], "add_generation_prompt": False})


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': messages}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', messages) | list }}",
    "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% set ns = namespace() %}{{ ns.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{{ range(100000000) | list }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_reaches_nothing(source: str) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    try:
        text = ChatTemplate(source, TOKENS).render(messages)
    except ChatTemplateError:
        text = ""
    for leak in ("<class", "subclass", "uid=", "__builtins__", "function", "{'"):
        assert leak not in text
    assert messages == [{"role": "user", "content": "Hi"}]


def test_the_date_is_todays() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') | int > 2000 }}", TOKENS).render([]) == "True"
