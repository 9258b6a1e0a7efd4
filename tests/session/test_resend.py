"""Clients that send the whole conversation every time: only what is new is evaluated, and nothing is mistaken."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_csp import Context, Pruning, Sampling, Session, VisionModel, parse_budget
from edge_csp.chat import ChatTemplate, PictureReader, read_messages
from edge_csp.usage import Counters

ALBUM = Path(__file__).parents[2] / "edge_csp" / "demo" / "album"
QUESTION, SECOND, THIRD = "Describe picture 2.", "What colour is picture 7?", "Which shape is in picture 5?"
N_PICTURE = 8


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture
def context(model: VisionModel) -> Iterator[Context]:
    model._embeddings.clear()
    with Context(model, n_ctx=2048) as opened:
        yield opened


def image_part(number: int, *, flip: bool = False) -> dict[str, Any]:
    data = (ALBUM / f"{number:02}.png").read_bytes()
    if flip:
        stream = io.BytesIO()
        Image.open(io.BytesIO(data)).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(stream, "PNG")
        data = stream.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


class Client:
    """Keeps the messages as JSON, as clients of the OpenAI API do, and sends all of them at every turn.

    system: text of a system message.
    """

    def __init__(self, context: Context, budget: str | None, system: str | None = None) -> None:
        pruning = Pruning(parse_budget(budget) if budget else None)
        self.session = Session(context, pruning=pruning, sampling=Sampling(temperature=0))
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        album = [{"type": "text", "text": "This is Nan."}, *[image_part(n + 1) for n in range(N_PICTURE)]]
        self.messages.append({"role": "user", "content": album})

    def ask(self, question: str, *, keep_blanks: bool = True) -> tuple[str, Counters]:
        """The answer, and what this turn took."""
        self.messages.append({"role": "user", "content": question})
        before = vars(self.session.counters).copy()
        self.session.prefill(read_messages(json.loads(json.dumps(self.messages)), PictureReader()))
        self.session.prune()
        answer = "".join(self.session.generate(n_predict=16))
        self.messages.append({"role": "assistant", "content": answer if keep_blanks else answer.strip()})
        after = vars(self.session.counters)
        return answer, Counters(**{name: after[name] - before[name] for name in before})


def n_new(model: VisionModel, question: str) -> int:
    """Tokens of the end of an answer, the next question, and the head of the next answer."""
    return len(model._tokenize_text(f"<|end|><|user|>{question}<|assistant|>", False))


def script(monkeypatch: pytest.MonkeyPatch, model: VisionModel, *answers: Sequence[int | str]) -> None:
    """Let the sampler say these tokens instead: a text stands for its token."""
    end = next(token for token in range(model.n_vocab) if model.is_end(token))
    left = [list(answer) for answer in answers]

    class Scripted:
        def __init__(self, *_: object) -> None:
            self.tokens = left.pop(0)

        def sample(self, _context: object) -> int:
            token = self.tokens.pop(0) if self.tokens else end
            if isinstance(token, int):
                return token
            (token,) = model._tokenize_text(token, False)
            return token

        def close(self) -> None:
            pass

    monkeypatch.setattr("edge_csp.session.Sampler", Scripted)


@pytest.mark.parametrize("system", [None, "Be short."])
@pytest.mark.parametrize("budget", [None, "20%"])
def test_later_turns_evaluate_only_what_is_new(context: Context, budget: str | None, system: str | None) -> None:
    client = Client(context, budget, system)
    answer, first = client.ask(QUESTION)
    assert answer == "A green cross with the digit 9."
    n_cell = first.n_picture_cell
    assert (first.n_encoded, first.n_picture, first.n_restart) == (N_PICTURE, N_PICTURE, 0)
    assert n_cell == N_PICTURE * 64
    for question in (SECOND, THIRD, QUESTION):
        _, turn = client.ask(question)
        assert (turn.n_encoded, turn.n_picture, turn.n_picture_cell, turn.n_restart) == (0, 0, 0, 0)
        assert turn.n_text_cell - turn.n_generated == n_new(context.model, question)
    assert (client.session.counters.n_evicted > 0) == (budget is not None)


@pytest.mark.parametrize("budget", [None, "20%"])
@pytest.mark.parametrize("keep_blanks", [True, False])
@pytest.mark.parametrize("answer", [["A", " green", " "], ["A", ".", "\n", "\n"], [" ", "A"], ["\n", " red", "\n"], []])
def test_blanks_around_an_answer(
    context: Context, budget: str | None, keep_blanks: bool, answer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates trim answers, and so do clients: at most the answer is read again."""
    script(monkeypatch, context.model, answer, answer, answer)
    client = Client(context, budget)
    client.ask(QUESTION)
    for question in (SECOND, THIRD):
        _, turn = client.ask(question, keep_blanks=keep_blanks)
        assert (turn.n_restart, turn.n_picture) == (0, 0)
        n_again = 0 if not answer or not answer[0].isspace() else len(answer)
        assert turn.n_text_cell - turn.n_generated <= n_new(context.model, question) + n_again


@pytest.mark.parametrize("budget", [None, "20%"])
def test_tokens_that_the_tokenizer_would_not_choose(
    context: Context, budget: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer was sampled letter by letter, and a later one is trimmed, so that the text has to be compared."""
    script(monkeypatch, context.model, ["r", "e", "d"], [" ", "b", "l", "u", "e"], ["A"])
    client = Client(context, budget)
    assert client.ask(QUESTION)[0] == "red"
    assert client.ask(SECOND)[0] == " blue"
    _, turn = client.ask(THIRD)
    assert (turn.n_restart, turn.n_picture) == (0, 0)
    assert turn.n_text_cell - turn.n_generated <= n_new(context.model, THIRD) + 4


@pytest.mark.parametrize("budget", [None, "20%"])
def test_an_edited_answer_is_read_again(context: Context, budget: str | None) -> None:
    client = Client(context, budget)
    client.ask(QUESTION)
    client.messages[-1]["content"] = "A red heart with the digit 1."
    _, turn = client.ask("What is it?")
    assert (turn.n_restart, turn.n_picture) == (0, 0)
    words = context.model._tokenize_text("A red heart with the digit 1.", False)
    assert turn.n_text_cell - turn.n_generated <= n_new(context.model, "What is it?") + len(words)
    fresh = Session(context, sampling=Sampling(temperature=0))
    context.clear()
    fresh.prefill(read_messages(client.messages[:-1], PictureReader()))
    assert [item.key for item in fresh._items] == [item.key for item in client.session._items[: len(fresh._items)]]


@pytest.mark.parametrize("budget", [None, "20%"])
@pytest.mark.parametrize("said", ["", "What is it?"])
def test_another_picture_in_the_same_place_is_not_taken_for_the_old_one(
    context: Context, budget: str | None, said: str
) -> None:
    """The text of the prompt is the same; the picture is not."""
    client = Client(context, budget)
    if said:
        client.ask(said)
    else:
        client.session.prefill(read_messages(client.messages, PictureReader()))
        client.session.prune()
    parts = client.messages[0]["content"]
    parts[6] = image_part(6, flip=True)
    _, turn = client.ask(QUESTION)
    assert turn.n_encoded == 1
    if budget:
        assert (turn.n_restart, turn.n_picture) == (1, N_PICTURE)
    else:
        assert (turn.n_restart, turn.n_picture) == (0, N_PICTURE - 5)
    keys = [item.key[0] for item in client.session._items if item.is_picture]
    messages = read_messages(client.messages, PictureReader())
    assert keys == [part["picture"].sha256 for part in messages[0]["content"] if part["type"] == "image"]


def test_an_edited_answer_in_a_bounded_cache(model: VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells were evicted while answering: everything is read again, pictures included, from embeddings in memory."""
    script(monkeypatch, model, ["r", "e", "d"], ["A"] * 100, ["A"], ["A"])
    with Context(model, n_ctx=256) as context:
        client = Client(context, None)
        client.session.pruning = Pruning(cells=256)
        client.ask(QUESTION)
        client.messages.append({"role": "user", "content": QUESTION})
        client.session.prefill(read_messages(client.messages, PictureReader()))
        assert len("".join(client.session.generate(n_predict=100))) == 100
        client.messages.append({"role": "assistant", "content": "B"})
        _, turn = client.ask(SECOND)
        assert (turn.n_restart, turn.n_picture, turn.n_encoded) == (1, N_PICTURE, 0)
        _, turn = client.ask(THIRD)
        assert (turn.n_restart, turn.n_picture) == (0, 0)


def test_the_same_prompt_again(context: Context) -> None:
    """Asking for another answer costs one token, where nothing was evicted."""
    client = Client(context, None)
    first, _ = client.ask(QUESTION)
    del client.messages[-2:]
    second, turn = client.ask(QUESTION)
    assert second == first
    assert turn.n_text_cell - turn.n_generated == 1


def test_thoughts_that_the_template_drops(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of thinking models leave thoughts out of earlier answers: the answer is read again, and no more."""
    answer = ["A", " ", "/", " ", "B"]
    script(monkeypatch, context.model, answer, answer, answer)
    client = Client(context, "20%")
    client.session.template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
        "{{ m.content.split('/')[-1] | trim }}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        context.model.info.bos_token,
    )
    client.ask(QUESTION)
    for question in (SECOND, THIRD):
        _, turn = client.ask(question)
        assert (turn.n_restart, turn.n_picture) == (0, 0)
        assert turn.n_text_cell - turn.n_generated == n_new(context.model, question) + 1
