"""Chat templates: messages with pictures -> the prompt, with one MEDIA_MARKER per picture.

A GGUF file brings its template as Jinja source, written by strangers: it runs in Jinja's sandbox, where it can compute
but not reach Python's insides (how long it computes is not limited). Templates are rendered as transformers does.

Pictures. As in llama.cpp, a picture part is given to the template as text, MEDIA_MARKER, around which libmtmd puts the
model's own picture tokens. The prompt must have exactly one marker per picture: the n-th marker is the n-th picture.
Users cannot forge one: a literal "<__media__>" in a text is changed to "< __media__ >".
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_csp.errors import TemplateError

__all__ = ["FALLBACK_TEMPLATE", "MEDIA_MARKER", "ChatTemplate", "Message"]

Message = Mapping[str, Any]
"""{"role": str, "content": str | list of parts, ...}; parts are {"type": "text", "text": str} or
{"type": "image", ...} ("image_url" is taken as well). Other keys are handed to the template as they are."""

MEDIA_MARKER = "<__media__>"
"""Stands for one picture in a rendered prompt; the default marker of libmtmd."""
_HARMLESS_MARKER = "< __media__ >"

FALLBACK_TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content + '\n\n' }}
{%- elif message.role == 'user' %}{{ 'USER: ' + message.content + '\n' }}
{%- else %}{{ 'ASSISTANT: ' + message.content | trim + eos_token + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""Used when a model brings no template: the Vicuna form that LLaVA-1.5 was trained on."""

_PICTURE_PARTS = ("image", "image_url")
_PROBE = "edge-csp-probe"


class ChatTemplate:
    """A chat template, ready to render.

    template: Jinja source, None for the plain one above. bos_token, eos_token: texts of these tokens, for templates
    that write them. is_fallback tells whether the plain one is used; `notice` says so in words (else None).

    Raises TemplateError if the template is no valid Jinja.
    """

    def __init__(self, template: str | None, bos_token: str = "", eos_token: str = "") -> None:
        self.is_fallback = template is None
        self.notice = "the model brings no chat template: using USER: ... ASSISTANT: ..." if self.is_fallback else None
        self.bos_token = bos_token
        self.eos_token = eos_token
        try:
            self._template = _environment().from_string(FALLBACK_TEMPLATE if template is None else template)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"the chat template is damaged in line {error.lineno}: {error.message}") from error
        except Exception as error:  # the compiler gives up in other ways on extreme templates
            raise TemplateError(f"the chat template cannot be compiled: {_reason(error)}") from error
        self._typed_only = self._takes([{"type": "text", "text": _PROBE}]) and not self._takes(_PROBE)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: object) -> str:
        """Return the prompt for `messages`, with exactly one MEDIA_MARKER per picture, in order.

        add_generation_prompt: end with the head of the assistant's turn. extra: more variables for the template.

        Raises TemplateError for malformed messages, if the template refuses them or fails (with its own words), and if
        it loses or doubles pictures.
        """
        n_picture = 0
        given = []
        for message in messages:
            content, n_added = self._content(message)
            given.append({**message, "content": content})
            n_picture += n_added
        text = self._run(given, add_generation_prompt, extra)
        if (n_marker := text.count(MEDIA_MARKER)) != n_picture:
            raise TemplateError(f"the chat template was given {n_picture} pictures, but its prompt has {n_marker}")
        return text

    def delta(
        self, previous: str, messages: Sequence[Message], add_generation_prompt: bool = True, **extra: object
    ) -> str | None:
        """Return what rendering `messages` adds to the prompt `previous`, or None if it does not start with it.

        previous: what `render` returned for earlier turns (with the answer added, if it was evaluated).
        """
        text = self.render(messages, add_generation_prompt, **extra)
        return text[len(previous) :] if text.startswith(previous) else None

    def _content(self, message: Message) -> tuple[str | list[dict[str, str]], int]:
        """Return the content in the form that the template takes, and the number of pictures in it."""
        if not isinstance(message, Mapping):
            raise TemplateError(f"a message is {type(message).__name__}, not a mapping with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise TemplateError(f"a message has the role {role!r}, which is no text")
        parts = [{"type": "text", "text": content or ""}] if content is None or isinstance(content, str) else content
        if not isinstance(parts, Sequence):
            raise TemplateError(f"the content of the {role} message is neither text nor a list of parts")
        texts: list[str] = []
        n_picture = 0
        after_text = False
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in _PICTURE_PARTS:
                texts.append(MEDIA_MARKER)
                n_picture += 1
            elif kind == "text" and isinstance(part.get("text"), str):
                text = part["text"].replace(MEDIA_MARKER, _HARMLESS_MARKER)
                if after_text:  # as llama.cpp joins them
                    texts[-1] += "\n" + text
                else:
                    texts.append(text)
            else:
                raise TemplateError(f"the {role} message has a part of type {kind!r}: only text and image are known")
            after_text = kind == "text"
        if self._typed_only:
            return [{"type": "text", "text": text} for text in texts or [""]], n_picture
        return "".join(texts), n_picture

    def _takes(self, content: str | list[dict[str, str]]) -> bool:
        """Tell whether the template writes the text of a content of this form, and not the form itself."""
        try:
            text = self._run([{"role": "user", "content": content}], True, {})
        except TemplateError:
            return False
        return _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text

    def _run(self, messages: list[dict[str, Any]], add_generation_prompt: bool, extra: Mapping[str, object]) -> str:
        variables: dict[str, object] = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": None,
        }
        try:
            return self._template.render({**variables, **extra})
        except Exception as error:  # templates are programs: they fail in every way
            raise TemplateError(f"the chat template failed: {_reason(error)}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    """Return a sandbox with what chat templates expect of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks answers for training, and changes nothing in the prompt."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: object, **options: Any) -> str:
    """JSON as models saw it in training; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
