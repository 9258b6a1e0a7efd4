"""The demo's trainer: pictures, chat format, tokenizer and albums. Nothing here needs torch or llama.cpp."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from edge_csp.demo import albums as demo_albums
from edge_csp.demo import scenes as demo_scenes
from tools.train_demo import MMPROJ_FILE, NAME, TEXT_FILE, albums, chat

CONVERSATIONS = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "user", "content": "<__media__>\n  What is in picture 1?  "}],
    [{"role": "user", "content": "<__media__><__media__>"}, {"role": "user", "content": "Describe picture 2."}],
    [
        {"role": "user", "content": [{"type": "text", "text": "This is Max."}, {"type": "image", "image": "a.png"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Okay."}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<__media__>"},
                {"type": "text", "text": ""},
                {"type": "text", "text": "Describe Max."},
            ],
        },
    ],
]


def _labels(n: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, 8, n), rng.integers(0, 8, n), rng.integers(0, 10, n)], 1)


def _template() -> object:
    jinja2 = pytest.importorskip("jinja2")
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined).from_string(chat.TEMPLATE)


@pytest.mark.parametrize("cue", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_template_renders_what_was_trained(messages: list[chat.Message], cue: bool) -> None:
    trained = "".join(segment.text for segment in chat.segments(messages, cue=cue))
    assert _template().render(messages=messages, add_generation_prompt=cue) == trained  # type: ignore[attr-defined]


def test_template_renders_random_conversations_as_trained() -> None:
    template, rng, labels = _template(), random.Random(3), _labels()
    for _ in range(20):
        messages = albums.make_conversation(rng, labels, rng.randint(1, 16), 8).messages
        trained = "".join(segment.text for segment in chat.segments(messages, cue=True))
        assert template.render(messages=messages, add_generation_prompt=True) == trained  # type: ignore[attr-defined]


def test_template_layout() -> None:
    text = "".join(segment.text for segment in chat.segments(CONVERSATIONS[3], cue=True))
    assert text == (
        "<|bos|><|user|>This is Max.\nPicture 1: <__media__><|assistant|>Okay.<|end|>"
        "<|user|>Picture 2: <__media__>\nDescribe Max.<|assistant|>"
    )


def test_tokenizer_knows_every_word_of_the_conversations() -> None:
    tok, rng, labels = albums.tokenizer(), random.Random(5), _labels()
    for _ in range(50):
        conversation = albums.make_conversation(rng, labels, 6, 16, spelled=0.0)
        for segment in chat.segments(conversation.messages):
            if segment.kind in ("text", "header", "answer"):
                tokens = tok.encode(segment.text)
                assert tok.decode(tokens) == segment.text
                long = [tok.tokens[t] for t in tokens if re.fullmatch(r"[A-Za-z]", tok.tokens[t])]
                assert set(long) <= {"A", "a"}, f"{segment.text!r} falls apart into letters"


@pytest.mark.parametrize("text", ["", "  two  spaces ", "naïve Zorblax_9 12345!?\n\n", "日本語 and 🙂", "DON'T it's"])
def test_tokenizer_takes_any_text(text: str) -> None:
    tok = albums.tokenizer()
    assert tok.decode(tok.encode(text)) == text
    assert not any(tok.is_control(t) for t in tok.encode("<|end|>"))


def test_vocabulary_suits_gguf() -> None:
    tok = albums.tokenizer()
    assert len(tok) % 32 == 0
    assert len(set(tok.tokens)) == len(tok)
    assert set(chat.byte_alphabet()) <= set(tok.tokens)
    assert [tok.is_control(tok.id[t]) for t in (*chat.CONTROL_TOKENS, "A")] == [True] * 5 + [False]


def test_conversation_answers_follow_from_what_was_said() -> None:
    rng, labels = random.Random(11), _labels()
    for _ in range(50):
        c = albums.make_conversation(rng, labels, 5, 10, renumber=True)
        answers = [m["content"] for m in c.messages if m["role"] == "assistant"]
        assert len(answers) == len(c.targets)
        assert len(c.pictures) == len(c.numbers) == len(c.names) == 5
        for target, answer in zip(c.targets, answers, strict=True):
            if target.kind == "describe_number":
                row = c.pictures[c.numbers.index(target.number)]
                assert answer == demo_albums.describe(demo_scenes.Scene(*labels[row]))
            elif target.kind == "code":
                assert any(name == target.name and answer.rstrip(".") in line for line, name in c.facts.items())


def test_album_is_fixed_by_its_seed_and_asks_everything() -> None:
    labels = _labels()
    album = demo_albums.make_album(4, labels, 12, 2)
    assert album == demo_albums.make_album(4, labels, 12, 2)
    assert album != demo_albums.make_album(5, labels, 12, 2)
    assert {kind for kind, _, _ in album.questions} == set(demo_albums.QUESTIONS)
    assert len(album.questions) == 2 * len(demo_albums.QUESTIONS)
    seen = [tuple(labels[row][:2]) for row in album.pictures]
    assert len(set(seen)) == 12


def test_digits_held_out_are_disjoint() -> None:
    pytest.importorskip("sklearn")
    from tools.train_demo import scenes

    images, targets = scenes.load_digit_images()
    split = scenes.split_digits(len(images))
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == len(images)
    assert len(split.held_out) == scenes.N_HELD_OUT_DIGITS
    assert set(targets[split.held_out]) == set(range(10))
    shipped, labels = demo_scenes.held_out_digits()
    assert np.array_equal(shipped, images[split.held_out])
    assert np.array_equal(labels, targets[split.held_out])


def test_pictures_are_fixed_by_their_seed() -> None:
    pytest.importorskip("sklearn")
    from tools.train_demo import scenes

    pictures, labels = scenes.make_scenes(6, seed=2, held_out=True)
    again, _ = scenes.make_scenes(6, seed=2, held_out=True)
    other, _ = scenes.make_scenes(6, seed=2, held_out=False)
    shipped, _ = demo_scenes.held_out_scenes(6, seed=2)
    assert pictures.shape == (6, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert labels.shape == (6, 3)
    assert np.array_equal(pictures, again)
    assert np.array_equal(pictures, shipped)
    assert not np.array_equal(pictures, other)


@pytest.mark.parametrize("shape", range(8))
def test_every_shape_shows_its_color(shape: int) -> None:
    digits, targets = demo_scenes.held_out_digits()
    scene = demo_scenes.Scene(0, shape, int(targets[0]))
    picture = demo_scenes.draw_scene(scene, digits[0], np.random.default_rng(shape)).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 80) & (picture[..., 2] < 80)
    assert 60 < red.sum() < 1300


DEMO = Path(__file__).parents[2] / "edge_csp" / "demo"


def test_embedded_files_are_what_the_trainer_writes() -> None:
    gguf = pytest.importorskip("gguf")
    text, mmproj = (gguf.GGUFReader(DEMO / name).fields for name in (TEXT_FILE, MMPROJ_FILE))
    assert text["tokenizer.chat_template"].contents() == chat.TEMPLATE
    assert text["tokenizer.ggml.tokens"].contents() == albums.tokenizer().tokens
    assert text["general.name"].contents() == mmproj["general.name"].contents() == NAME
    assert text["llama.embedding_length"].contents() == mmproj["clip.vision.projection_dim"].contents()
    assert list(mmproj["clip.vision.feature_layer"].contents()) == [mmproj["clip.vision.block_count"].contents()]


def test_embedded_album_is_what_its_seed_draws() -> None:
    from PIL import Image

    stored = json.loads((DEMO / "album" / "album.json").read_text(encoding="utf-8"))
    pool, labels = demo_scenes.held_out_scenes(demo_albums.DEMO_POOL, demo_albums.DEMO_POOL_SEED + 1)
    album = demo_albums.make_album(1, labels, demo_albums.DEMO_PICTURES, 2)
    assert [(q["kind"], q["q"], q["a"]) for q in stored["questions"]] == album.questions
    names = [part["image"] for part in stored["messages"][0]["content"] if part["type"] == "image"]
    assert len(names) == demo_albums.DEMO_PICTURES
    for name, row in zip(names, album.pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(DEMO / "album" / name)), pool[row])
