"""Renders a conversation with the checkpoint's own jinja2 template, in a sandbox.

Templates are written for Hugging Face `transformers`; names, filters and whitespace rules are its.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
_OPEN_END = "<<the answer continues here>> "


class ChatTemplateError(ValueError):
    """The template is malformed, or refused this conversation; the message is fit for the client."""


class ChatTemplate:
    """A compiled template. `special_tokens` (see Tokenizer.special_tokens) become variables of it.

    Raises ChatTemplateError when the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            tree = environment.parse(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._takes_parts = _takes_parts(tree)
        self._takes_text = not self._takes_parts or any(test.name == "string" for test in tree.find_all(nodes.Test))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens written out: encode it with `add_special_tokens=False`.

        messages: OpenAI messages as plain JSON types. Content parts of type "text" are joined with newlines unless
          the template takes parts itself.
        continue_final_message: leave the last message open, so that the answer continues it.
        template_kwargs: further variables (`chat_template_kwargs` of vLLM).

        Raises ChatTemplateError: the template refused (`raise_exception`), failed, or misbehaved.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError("continue_final_message and add_generation_prompt cannot both be true")
        variables = _inert(template_kwargs or {})
        if taken := sorted(_OWN_VARIABLES & variables.keys()):
            raise ChatTemplateError(f"chat_template_kwargs must not set {', '.join(taken)}")
        chat = [self._message(message) for message in _inert(messages)]
        if continue_final_message:
            _mark_open_end(chat)
        text = self._render(
            {
                **self._special_tokens,
                **variables,
                "messages": chat,
                "tools": _inert(tools),
                "documents": _inert(documents),
                "add_generation_prompt": add_generation_prompt,
            }
        )
        return _cut_at_open_end(text) if continue_final_message else text

    def _render(self, variables: Mapping[str, Any]) -> str:
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(str(error)) from error
        except Exception as error:  # a template is a program: whatever it does wrong is a bad request, not our fault
            raise ChatTemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise ChatTemplateError(f"a message must be an object, not {message!r}")
        content = message.get("content")
        if isinstance(content, list) and not self._takes_parts:
            message["content"] = "\n".join(map(_text_of, content))
        elif isinstance(content, str) and not self._takes_text:
            message["content"] = [{"type": "text", "text": content}]
        for call in message.get("tool_calls") or ():
            if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
                _parse_arguments(function)
        return message


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") == "text":
        return str(part.get("text", ""))
    kind = part.get("type") if isinstance(part, dict) else part
    raise ChatTemplateError(f"content part {kind!r} is not supported: this model takes text only")


def _parse_arguments(function: dict[str, Any]) -> None:
    """OpenAI sends a call's arguments as JSON text; templates are written for the object."""
    if isinstance(arguments := function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(arguments) if arguments else {}
        except ValueError as error:
            raise ChatTemplateError(f"arguments of the tool call {function.get('name')!r} are not JSON") from error


def _inert(value: Any) -> Any:
    """A copy made of plain JSON types, so that a template can reach no object with methods of ours."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(f"messages, tools and template arguments must be JSON: {error}") from error


def _mark_open_end(chat: list[dict[str, Any]]) -> None:
    last = chat[-1] if chat else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _OPEN_END
        return
    for part in reversed(content or ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _OPEN_END
            return
    raise ChatTemplateError("continue_final_message needs a final message with text to continue")


def _cut_at_open_end(text: str) -> str:
    at = text.rfind(_OPEN_END.strip())
    if at < 0:
        raise ChatTemplateError("the chat template leaves out the final message, so it cannot be continued")
    # Where the template trimmed the message, the trimmed text goes on without its last spaces too.
    return text[:at] if text.startswith(_OPEN_END, at) else text[:at].rstrip()


def _takes_parts(tree: nodes.Template) -> bool:
    """Whether the template goes through a message's content part by part.

    That is a loop over `<anything>.content` (or `['content']`), or over a variable that was set to it.
    """
    aliases = {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, frozenset())
    }
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, aliases: frozenset[str] | set[str]) -> bool:
    match node:
        case nodes.Filter(node=inner) if inner is not None:
            return _is_content(inner, aliases)
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in aliases
    return False


class _GenerationTag(Extension):
    """`{% generation %}`: marks the model's own words for training; here it only shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: jinja2's own filter escapes what is special in HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
