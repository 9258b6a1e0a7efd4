"""Chat templates: rendering, pictures, hostile templates and messages."""

import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_csp.chat import FALLBACK_TEMPLATE, MEDIA_MARKER, ChatTemplate, PictureReader, read_messages
from edge_csp.errors import ImageError, TemplateError
from edge_csp.images import load_picture
from edge_csp.metadata import read_info

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
# Takes lists of parts only, as those of SmolVLM and Idefics do.
TYPED = (
    "<s>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Takes both, as those of Qwen2-VL do.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<img>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Allows no system role, and alternating turns only, as those of Gemma and Mistral do.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must\nalternate') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | trim }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
)
TEMPLATES = [CHATML, TYPED, BOTH, STRICT, None]
PICTURE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_start|>user\n<__media__>What?<|im_end|>\n<|im_start|>assistant\n"),
        (TYPED, "<s>User: <__media__>What?<end>\nAssistant:"),
        (BOTH, "<user><__media__>What?</><assistant>"),
        (STRICT, "[user] <__media__>What?"),
        (None, "USER: <__media__>What?\nASSISTANT:"),
    ],
)
def test_a_picture_and_a_question(template: str | None, expected: str) -> None:
    chat = ChatTemplate(template)
    assert chat.render([user(PICTURE, text("What?"))]) == expected
    assert chat.render([user({"type": "image_url", "image_url": {"url": "x"}}, text("What?"))]) == expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_is_given_in_the_form_the_template_takes(template: str | None) -> None:
    chat = ChatTemplate(template)
    assert chat.render([user("Hello")]) == chat.render([user(text("Hello"))])
    assert "Hello" in chat.render([user("Hello")])


def test_parts_are_joined_as_in_llama_cpp() -> None:
    chat = ChatTemplate(BOTH)
    parts = [text("a"), text("b"), PICTURE, text("c"), PICTURE, PICTURE, text("d"), text("e")]
    assert chat.render([user(*parts)], False) == "<user>a\nb<__media__>c<__media__><__media__>d\ne</>"


def test_plain_template_goes_on_from_an_answer() -> None:
    """Models of this form begin an answer with a blank: the next prompt goes on from the tokens that were evaluated."""
    chat = ChatTemplate(None, eos_token="</s>")
    first = chat.render([user("Hi")])
    messages = [user("Hi"), {"role": "assistant", "content": " Hello."}, user("Bye")]
    assert chat.delta(first + " Hello.", messages) == "</s>\nUSER: Bye\nASSISTANT:"


def test_variables_and_whitespace_of_transformers() -> None:
    source = """\
{% for m in messages %}
    {% if m.role == 'none' %}{% continue %}{% endif %}
{{ bos_token }}{{ m.content }}{{ eos_token }}
    {% generation %}
x
    {% endgeneration %}
{% endfor %}
{{ {'ä': "<'&'>"} | tojson }} {{ [1] | tojson(indent=2) }} {{ tools is none }} {{ mood }}
{{ strftime_now('%Y') | length }}"""
    chat = ChatTemplate(source, "<s>", "</s>")
    rendered = chat.render([user("hi"), {"role": "none", "content": ""}], mood="calm")
    assert rendered == "<s>hi</s>\nx\n" + json.dumps({"ä": "<'&'>"}, ensure_ascii=False) + " [\n  1\n] True calm\n4"


def test_other_keys_reach_the_template() -> None:
    chat = ChatTemplate("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}")
    assert chat.render([{"role": "tool", "name": "clock", "content": None}]) == "clock"


@pytest.mark.parametrize("template", TEMPLATES)
def test_users_cannot_forge_a_picture(template: str | None) -> None:
    chat = ChatTemplate(template)
    rendered = chat.render([user(text(f"see {MEDIA_MARKER}"), PICTURE, text(f"{MEDIA_MARKER}{MEDIA_MARKER}"))])
    assert rendered.count(MEDIA_MARKER) == 1
    assert "see < __media__ ><__media__>< __media__ >< __media__ >" in rendered
    split = chat.render([user(text("<__media"), text("__>"))])
    assert MEDIA_MARKER not in split


def test_forging_through_the_template_is_refused(refuses) -> None:
    chat = ChatTemplate("{% for m in messages %}{{ m.content | replace('|', '') }}{% endfor %}")
    with refuses(TemplateError, "0 pictures", "1"):
        chat.render([{"role": "user", "content": "<__me|dia__>"}])


@given(st.lists(st.one_of(st.none(), st.text(max_size=9), st.just(MEDIA_MARKER), st.just("<__")), max_size=8))
def test_one_marker_per_picture(parts: list[str | None]) -> None:
    content = [PICTURE if part is None else text(part) for part in parts]
    for chat in CHATS:
        assert chat.render([user(*content)]).count(MEDIA_MARKER) == parts.count(None)


CHATS = [ChatTemplate(template) for template in TEMPLATES]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("nothing", "0"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "4"),
        ("{{ messages[0].content | upper }}", "0"),
    ],
)
def test_lost_and_doubled_pictures(template: str, found: str, refuses) -> None:
    messages = [user(PICTURE, PICTURE)] if "reverse" not in template else [user(PICTURE), user(PICTURE)]
    with refuses(TemplateError, "2 pictures", found):
        ChatTemplate(template).render(messages)


def test_refusals_in_the_words_of_the_template(refuses) -> None:
    chat = ChatTemplate(STRICT)
    with refuses(TemplateError, "System role not supported"):
        chat.render([{"role": "system", "content": "Be kind."}, user("Hi")])
    with refuses(TemplateError, "Roles must alternate"):
        chat.render([user("Hi"), user("Hi")])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", ("damaged", "line 1")),
        ("\n\n{{ x ", ("damaged", "line 3")),
        ("{% unknown_tag %}", ("damaged", "line 1", "unknown_tag")),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ("__class__", "unsafe")),
        ("{{ messages.__init__.__globals__ }}", ("__init__", "unsafe")),
        ("{{ cycler.__init__.__globals__.os.popen('id') }}", ("__init__", "unsafe")),
        ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__['json'] }}", ("failed",)),
        ("{{ messages.append(1) }}", ("failed", "append")),
        ("{{ messages[0].update(role='x') }}", ("failed", "update")),
        ("{% for i in range(10**9) %}x{% endfor %}", ("failed", "Range too big")),
        ("{{ 1 // 0 }}", ("failed", "division")),
        ("{{ messages[7].content + 'x' }}", ("failed",)),
        ("{% include '/etc/passwd' %}", ("failed",)),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ("failed", "recursion")),
    ],
)
def test_bad_templates(template: str, words: tuple[str, ...], refuses) -> None:
    with refuses(TemplateError, "chat template", *words):
        ChatTemplate(template).render([user("Hi")])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hello", ("str", "mapping")),
        ({"content": "x"}, ("role", "None")),
        ({"role": 5, "content": "x"}, ("role", "5")),
        ({"role": "user", "content": 7}, ("user", "neither text nor a list")),
        ({"role": "user", "content": ["x"]}, ("user", "None")),
        ({"role": "user", "content": [{"type": "video"}]}, ("user", "'video'")),
        ({"role": "user", "content": [{"type": "text"}]}, ("user", "'text'")),
    ],
)
def test_malformed_messages(message: Any, words: tuple[str, ...], refuses) -> None:
    with refuses(TemplateError, *words):
        ChatTemplate(CHATML).render([message])


def test_fallback_is_announced() -> None:
    chat = ChatTemplate(None, eos_token="</s>")
    assert chat.is_fallback
    assert "no chat template" in str(chat.notice)
    assert ChatTemplate(FALLBACK_TEMPLATE).notice is None
    messages = [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("Bye")]
    assert chat.render(messages) == "Be kind.\n\nUSER: Hi\nASSISTANT: Hello.</s>\nUSER: Bye\nASSISTANT:"


@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_extend_each_other(template: str | None) -> None:
    chat = ChatTemplate(template, "<s>", "</s>")
    messages = [user(PICTURE, text("What?"))]
    rendered = chat.render(messages)
    for turn in range(3):
        messages += [assistant(f"Answer {turn}."), user(text(f"Question {turn}"), PICTURE)]
        delta = chat.delta(rendered, messages)
        assert delta is not None
        assert delta.count(MEDIA_MARKER) == 1
        assert f"Answer {turn}." in delta
        rendered += delta
    assert rendered == chat.render(messages)


def test_delta_of_a_changed_past() -> None:
    chat = ChatTemplate(CHATML)
    assert chat.delta(chat.render([user("Hi")]), [user("Ho")]) is None
    drops_thoughts = (
        "{% for m in messages %}{{ m.content.split('</think>')[-1] if not loop.last else m.content }}{% endfor %}"
    )
    chat = ChatTemplate(drops_thoughts)
    first = [user("Q"), assistant("hm</think>A")]
    assert chat.delta(chat.render(first), [*first, user("R")]) is None
    assert chat.delta("Q", [user("Q")]) == ""


def test_real_template(shared) -> None:
    info = read_info(shared / "models" / "bootstrap-text-f16.gguf")
    chat = ChatTemplate(info.chat_template, info.bos_token, info.eos_token)
    content = user(text("#1 jon:"), PICTURE, text("digit #1?"))
    assert chat.render([content]) == "<|bos|><|user|>#1 jon:<__media__>digit #1?<|assistant|>"


# --- messages of the OpenAI API ---


def png(seed: int, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shows(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def test_messages_of_the_openai_api() -> None:
    given = [
        {"role": "developer", "content": "Be kind."},
        user(shows(data_url(png(1))), text("What?"), shows(data_url(png(2), "image/jpeg"))),
        {"role": "assistant", "content": None, "tool_calls": []},
        user({"type": "image_url", "image_url": data_url(png(1), "IMAGE/PNG;charset=x")}),
    ]
    before = json.dumps(given)
    system, first, answer, second = read_messages(given, PictureReader())
    assert json.dumps(given) == before
    assert system == {"role": "system", "content": "Be kind."}
    assert answer == given[2]
    assert first["content"][1] == text("What?")
    pictures = [part["picture"] for part in (*first["content"], *second["content"]) if part["type"] == "image"]
    assert [picture.name for picture in pictures] == ["picture 1", "picture 2", "picture 3"]
    assert [picture.sha256 for picture in pictures] == [load_picture(png(seed)).sha256 for seed in (1, 2, 1)]
    assert ChatTemplate(CHATML).render([first]).count(MEDIA_MARKER) == 2


def test_pictures_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def load(source: bytes, *, name: str, max_side: int) -> Any:
        decoded.append(name)
        return load_picture(source, name=name, max_side=max_side)

    monkeypatch.setattr("edge_csp.chat.load_picture", load)
    reader = PictureReader(limit=3 * 8 * 8 * 3, max_side=8)
    for _ in range(2):
        for seed in (1, 2, 3):
            picture = reader.open(data_url(png(seed)), f"{seed}")
            assert picture.name == f"{seed}"
    assert reader.open(data_url(png(1)), "other").name == "other"
    assert decoded == ["1", "2", "3"]
    reader.open(data_url(png(4)), "4")  # in the place of 2, the longest unused one
    for seed in (1, 3, 4, 2):
        reader.open(data_url(png(seed)), f"{seed}")
    assert decoded == ["1", "2", "3", "4", "2"]
    large = reader.open(data_url(png(5, 30)), "5")  # always at least the last one
    assert large.size == (8, 8)


def test_files_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "in").mkdir(parents=True)
    file = folder / "in" / "a b.png"
    file.write_bytes(png(1))
    reader = PictureReader(folder=folder)
    for url in ("in/a b.png", str(file), file.as_uri(), "in/../in/a b.png"):
        assert reader.open(url, "p").sha256 == load_picture(file).sha256
    file.write_bytes(png(2))  # the same size, perhaps the same time
    os.utime(file, (1e9, 1e9))
    assert reader.open("in/a b.png", "p").sha256 == load_picture(png(2)).sha256


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.org/a.png", ("not fetched", "data:")),
        ("ftp://example.org/a.png", ("not fetched",)),
        ("http://[", ("address",)),
        ("../secret.png", ("not in the folder",)),
        ("/etc/passwd", ("not in the folder",)),
        ("file:///etc/passwd", ("not in the folder",)),
        ("link.png", ("not in the folder",)),
        ("gone.png", ("gone.png", "cannot be read")),
        ("a" * 5000, ("cannot be read",)),
        ("nul\0", ("nul",)),
        ("", ("directory",)),
        ("data:", ("data:image/png;base64",)),
        ("data:image/png,abc", ("data:image/png;base64",)),
        ("data:text/html;base64,AAAA", ("text/html", "not a picture")),
        ("data:image/png;base64,A", ("damaged",)),
        ("data:image/png;base64,\u00e4\u00f6", ("damaged",)),
        ("data:image/png;base64,", ("empty",)),
        ("data:image/png;base64,AAAA", ("not a picture",)),
    ],
)
def test_addresses_that_are_refused(url: str, words: tuple[str, ...], tmp_path: Path, refuses) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    if sys.platform != "win32":
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with refuses(ImageError, "picture 1", *words):
        read_messages([user(shows(url))], PictureReader(folder=folder))


def test_files_are_refused_without_a_folder(refuses) -> None:
    for url in ("a.png", "/a.png", "file:///a.png"):
        with refuses(ImageError, url, "only data: addresses"):
            PictureReader().open(url, "picture 1")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, ("at least one",)),
        ([], ("at least one",)),
        ("hello", ("not a list",)),
        ({"role": "user"}, ("not a list",)),
        ([user("Hi"), "hello"], ("message 2", "role")),
        ([{"content": "Hi"}], ("message 1", "role")),
        ([{"role": "user", "content": 7}], ("message 1", "neither text nor a list")),
        ([user({"type": "input_audio"}, text("x"))], ("message 1", "'input_audio'", "image_url")),
        ([user({"type": "image", "picture": 1}, text("x"))], ("message 1", "'image'")),
        ([{"role": "user", "content": ["x"]}], ("message 1", "'x'")),
        ([user({"type": "image_url"}, text("x"))], ("message 1", "without a url")),
        ([user(shows(None))], ("message 1", "without a url")),
    ],
)
def test_messages_that_are_refused(messages: Any, words: tuple[str, ...], refuses) -> None:
    with refuses(TemplateError, *words):
        read_messages(messages, PictureReader())
