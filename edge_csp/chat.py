"""Chat templates: messages with pictures -> the prompt, with one MEDIA_MARKER per picture.

A GGUF file brings its template as Jinja source, written by strangers: it runs in Jinja's sandbox, where it can compute
but not reach Python's insides (how long it computes is not limited). Templates are rendered as transformers does.

Pictures. As in llama.cpp, a picture part is given to the template as text, MEDIA_MARKER, around which libmtmd puts the
model's own picture tokens. The prompt must have exactly one marker per picture: the n-th marker is the n-th picture.
Users cannot forge one: a literal "<__media__>" in a text is changed to "< __media__ >".

`read_messages` turns the messages of clients of the OpenAI API into ours. They come again at every turn, pictures
included, so `PictureReader` remembers what it has decoded.
"""

import base64
import binascii
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import url2pathname

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_csp.errors import ImageError, TemplateError
from edge_csp.images import MAX_SIDE, MEDIA_MARKER, Picture, load_picture

__all__ = ["FALLBACK_TEMPLATE", "MEDIA_MARKER", "ChatTemplate", "Message", "PictureReader", "read_messages"]

Message = Mapping[str, Any]
"""{"role": str, "content": str | list of parts, ...}; parts are {"type": "text", "text": str} or
{"type": "image", ...} ("image_url" is taken as well). Other keys are handed to the template as they are."""

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

PICTURE_BYTES = 512 << 20
"""Pixels that a PictureReader remembers."""

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


class PictureReader:
    """Opens the addresses of pictures: "data:" ones and, if a folder is given, files in it. Nothing is fetched.

    Decoded pictures are remembered, by the hash of their data or by the name and times of their file; the longest
    unused ones are forgotten when all together have more than `limit` bytes of pixels. Not thread-safe.
    """

    def __init__(self, *, folder: Path | None = None, max_side: int = MAX_SIDE, limit: int = PICTURE_BYTES) -> None:
        """folder: paths and "file:" addresses are read below it, and refused without it. max_side: see load_picture."""
        self._folder = folder.resolve() if folder else None
        self._max_side = max_side
        self._limit = limit
        self._known: OrderedDict[object, Picture] = OrderedDict()

    def open(self, url: str, name: str) -> Picture:
        """The picture at an address. name: what messages call it.

        Raises ImageError for pictures that cannot be read, and for addresses that are not allowed.
        """
        source: bytes | Path
        key: object
        if url[:5].lower() == "data:":
            key = hashlib.sha256(url.encode(errors="replace")).digest()
            source = b"" if key in self._known else _decode_data_url(url, name)
        else:
            source = self._path(url, name)
            try:
                stat = source.stat()
            except OSError as error:
                raise ImageError(f"{name}: {_shown(url)} cannot be read ({error.strerror or error})") from error
            key = source, stat.st_ino, stat.st_size, stat.st_mtime_ns
        picture = self._known.pop(key, None) or load_picture(source, name=name, max_side=self._max_side)
        self._known[key] = picture
        while len(self._known) > 1 and sum(known.rgb.nbytes for known in self._known.values()) > self._limit:
            self._known.popitem(last=False)
        return picture if picture.name == name else replace(picture, name=name)

    def _path(self, url: str, name: str) -> Path:
        shown = _shown(url)
        try:
            parts = urlsplit(url) if "://" in url else None
        except ValueError as error:
            raise ImageError(f"{name}: {shown} is no address ({error})") from error
        if parts and parts.scheme.lower() != "file":
            raise ImageError(f"{name}: {shown} is not fetched: send the picture itself, as a data: address")
        if self._folder is None:
            raise ImageError(f"{name}: {shown} is a file: only data: addresses are allowed")
        try:
            path = (self._folder / (url2pathname(parts.path) if parts else url)).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in it, or links in a circle
            raise ImageError(f"{name}: {shown} is no path ({error})") from error
        if not path.is_relative_to(self._folder):
            raise ImageError(f"{name}: {shown} is not in the folder of pictures")
        return path


def _shown(url: str) -> str:
    return url if len(url) <= 80 else url[:80] + "..."


def _decode_data_url(url: str, name: str) -> bytes:
    head, comma, data = url.partition(",")
    kind, *options = head[5:].lower().split(";")
    if not comma or "base64" not in [option.strip() for option in options]:
        raise ImageError(f"{name}: the data: address is not of the form data:image/png;base64,...")
    if kind and not kind.startswith("image/"):
        raise ImageError(f"{name}: the data: address holds {kind}, not a picture")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name}: the data: address is damaged ({error})") from error


def read_messages(messages: object, pictures: PictureReader) -> list[Message]:
    """Return messages as the OpenAI API has them as ours: with a Picture in every part that shows one.

    A content is a text, null, or a list of {"type": "text", "text": str} and {"type": "image_url", "image_url":
    {"url": str}}; pictures are called "picture 1" and so on, in order. The role "developer" becomes "system". Other
    keys stay as they are.

    Raises TemplateError for messages of another form, and ImageError for pictures that cannot be opened.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise TemplateError("messages is not a list with at least one message")
    n_picture = 0
    read: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TemplateError(f"message {len(read) + 1} is not an object with a role")
        content = message.get("content")
        if not (content is None or isinstance(content, str)):
            if not isinstance(content, Sequence):
                raise TemplateError(f"message {len(read) + 1} has a content that is neither text nor a list of parts")
            parts = []
            for part in content:
                if isinstance(part, Mapping) and part.get("type") == "image_url":
                    n_picture += 1
                    address = part.get("image_url")
                    url = address.get("url") if isinstance(address, Mapping) else address
                    if not isinstance(url, str):
                        raise TemplateError(f"message {len(read) + 1} has an image_url without a url")
                    part = {"type": "image", "picture": pictures.open(url, f"picture {n_picture}")}
                elif not (isinstance(part, Mapping) and part.get("type") == "text"):
                    kind = part.get("type") if isinstance(part, Mapping) else part
                    raise TemplateError(
                        f"message {len(read) + 1} has a part of type {kind!r}: only text and image_url are known"
                    )
                parts.append(part)
            content = parts
        role = "system" if message["role"] == "developer" else message["role"]
        read.append({**message, "role": role, "content": content})
    return read


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


def message_parts(message: Message) -> Sequence[dict[str, Any]]:
    """Parts of a message; none where its content is text."""
    content: str | Sequence[dict[str, Any]] = message["content"]
    return () if isinstance(content, str) else content


def message_pictures(messages: Sequence[Message]) -> list[Picture]:
    """The pictures of messages, in their order."""
    return [part["picture"] for message in messages for part in message_parts(message) if part["type"] == "image"]
