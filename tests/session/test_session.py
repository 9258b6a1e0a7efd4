"""Conversations: what is evaluated, what stays, and that nothing is lost when something goes wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from PIL import Image

from edge_csp import Context, Picture, Pruning, Sampling, Session, VisionModel, load_picture, make_policy, parse_budget
from edge_csp.chat import ChatTemplate
from edge_csp.errors import BudgetError, ContextError, ModelError, NativeError, TemplateError
from edge_csp.model import TokenPart

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture
def context(model: VisionModel) -> Iterator[Context]:
    with Context(model, n_ctx=2048) as opened:
        yield opened


def picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return load_picture(Image.fromarray(pixels), name=f"{seed}.png")


def session(context: Context, budget: str | None = None, policy: str = "csp", **settings: Any) -> Session:
    pruning = Pruning(parse_budget(budget) if budget else None, make_policy(policy), min_cells=0)
    return Session(context, pruning=pruning, sampling=GREEDY, **settings)


def ask(session: Session, text: str, *pictures: Picture, n_predict: int = 12) -> str:
    return "".join(session.ask(text, pictures, n_predict=n_predict))


def logits(context: Context) -> np.ndarray:
    pointer = llama_cpp.llama_get_logits_ith(context.handle, -1)
    return np.ctypeslib.as_array(pointer, shape=(context.model.n_vocab,)).copy()


@pytest.mark.parametrize("budget", [None, "30%"])
def test_six_turns_and_eight_pictures_are_evaluated_once(context: Context, budget: str | None) -> None:
    chat = session(context, budget)
    pictures = iter(range(100, 108) if budget else range(200, 208))
    for n_picture in (3, 1, 0, 2, 2, 0):
        ask(chat, "What is in picture 1?", *[picture(next(pictures)) for _ in range(n_picture)])
        counters, use = chat.counters, chat.cache_use()
        assert counters.n_text_cell + counters.n_picture_cell == use.n_token == chat.n_token
    assert (counters.n_turn, counters.n_picture, counters.n_encoded, counters.n_restart) == (6, 8, 8, 0)
    assert len(use.pictures) == 8


def test_incremental_prompt_is_the_whole_prompt(context: Context) -> None:
    """The logits after six turns are those of the whole conversation evaluated at once."""
    chat = session(context)
    for turn in range(3):
        ask(chat, "What is in picture 1?", picture(turn))
    messages = [*chat.messages, {"role": "user", "content": "Which digit?"}]
    chat.prefill(messages)
    incremental = logits(context)
    n_token = chat.n_token
    chat.clear()
    chat.prefill(messages)
    assert chat.n_token == n_token
    np.testing.assert_allclose(logits(context), incremental, atol=2e-2)  # f16 cache, other batches


def test_cells_add_up_and_stay_in_the_budget(context: Context) -> None:
    chat = session(context, "25%")
    for turn in range(3):
        answer = chat.ask("What is in picture 1?", [picture(turn), picture(10 + turn)], n_predict=4)
        next(answer)
        answer.close()  # the prompt has been pruned, the answer has not begun to fill cells
        use = chat.cache_use()
        assert use.n_cell == int(0.25 * use.n_token)
        assert use.n_cell == pytest.approx(use.text_kept + sum(p.kept for p in use.pictures))
        assert all(p.kept <= p.n_cell for p in use.pictures)
        assert use.text_kept <= use.n_text
    assert chat.counters.n_evicted > 0


@pytest.mark.parametrize("add_special", [False, True])
def test_text_alone_is_tokenised_as_by_libmtmd(model: VisionModel, add_special: bool) -> None:
    for text in ("", " ", "What?", "<|end|><|user|>Which digit?<|assistant|>", "é ß 🙂", "<__media__", "\n\n a  b"):
        assert model.tokenize(text, add_special=add_special) == [
            part for part in model._tokenize_mixed(text, (), add_special) if part != TokenPart(())
        ]
    with pytest.raises(ModelError, match="number of media markers"):
        model.tokenize("What is <__media__>?", add_special=add_special)


def test_policies(context: Context) -> None:
    kept = {}
    for policy in ("csp", "random", "full"):
        chat = session(context, "25%", policy)
        chat.clear()
        ask(chat, "What is in picture 1?", picture(1), picture(2), n_predict=1)
        kept[policy] = chat.cache_use().n_cell
    assert kept["csp"] == kept["random"] < kept["full"]


def test_pictures_are_encoded_once_in_a_process(model: VisionModel, context: Context) -> None:
    chat = session(context)
    ask(chat, "What is in picture 1?", picture(31), picture(32))
    n_encoded = model.n_encoded
    chat.clear()
    ask(chat, "What is in picture 1?", picture(32), picture(33))
    assert model.n_encoded == n_encoded + 1


@pytest.mark.parametrize("budget", [None, "25%"])
def test_undo(context: Context, budget: str | None) -> None:
    """After undo the same question gets the same answer; a pruned cache has to be filled again for it."""
    chat = session(context, budget)
    ask(chat, "What is in picture 1?", picture(1))
    first = ask(chat, "What is in picture 2?", picture(2))
    n_token, n_restart = chat.n_token, chat.counters.n_restart
    assert chat.undo()
    assert len(chat.messages) == 2
    if budget is None:
        assert ask(chat, "What is in picture 2?", picture(2)) == first
        assert chat.n_token == n_token
        assert chat.counters.n_restart == n_restart
    else:
        ask(chat, "What is in picture 2?", picture(3))
        assert chat.counters.n_restart == n_restart + 1
        assert chat.cache_use().pictures[1].name == "3.png"
    assert chat.undo()
    assert chat.undo()
    assert not chat.undo()
    assert chat.messages == []


def test_undo_keeps_the_system_message(context: Context) -> None:
    chat = session(context, system="Be short.")
    ask(chat, "What is in picture 1?", picture(1), n_predict=2)
    chat.undo()
    chat.clear()
    assert [message["role"] for message in chat.messages] == ["system"]


def test_too_long_a_prompt_changes_nothing(model: VisionModel) -> None:
    with Context(model, n_ctx=256) as context:
        chat = session(context)
        ask(chat, "What is in picture 1?", picture(1))
        before = (list(chat.messages), chat.n_token, context.n_cell, chat.counters.n_text_cell)
        chat.pruning = Pruning(policy=make_policy("full"))
        with pytest.raises(ContextError, match=r"the context has 256"):
            ask(chat, "word " * 500)
        assert before == (list(chat.messages), chat.n_token, context.n_cell, chat.counters.n_text_cell)
        ask(chat, "Which digit?")
        assert chat.counters.n_turn == 2


def test_answers_end_where_the_cache_is_full(model: VisionModel) -> None:
    with Context(model, n_ctx=256) as context:
        endless = Sampling(temperature=0, grammar='root ::= "a" root')
        chat = Session(context, pruning=Pruning(policy=make_policy("full")), sampling=endless)
        ask(chat, "What?", n_predict=-1)
        assert chat.finish_reason == "full"
        assert context.n_cell == 256


def test_closing_an_answer_keeps_what_was_said(context: Context) -> None:
    chat = session(context, "50%")
    answer = chat.ask("What is in picture 1?", [picture(1)])
    said = next(answer)
    answer.close()
    assert chat.finish_reason == "interrupt"
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    ask(chat, "And which digit?")
    assert chat.counters.n_restart == 0
    assert chat.counters.n_text_cell + chat.counters.n_picture_cell == chat.n_token


def test_an_interrupted_prompt_goes_on_where_it_stopped(context: Context) -> None:
    def interrupt(what: str, done: float) -> None:
        if interrupts and what == "prefill" and done > 0.3:
            interrupts.pop()
            raise KeyboardInterrupt

    chat = session(context, on_progress=interrupt)
    pictures = [picture(seed) for seed in range(4)]
    interrupts = [1]
    with pytest.raises(KeyboardInterrupt):
        ask(chat, "What is in picture 1?", *pictures)
    assert chat.messages == []
    assert 0 < chat.counters.n_picture < 4
    ask(chat, "What is in picture 1?", *pictures)
    assert chat.counters.n_picture == 4
    assert chat.counters.n_text_cell + chat.counters.n_picture_cell == chat.n_token


def test_budgets_in_bytes_and_cells(context: Context) -> None:
    chat = session(context, "40")
    ask(chat, "What is in picture 1?", picture(1), picture(2), n_predict=1)
    assert chat.cache_use().n_cell == 40 + 1  # and one token of the answer
    chat.pruning = Pruning(parse_budget(f"{20 * context.bytes_per_cell}B"))
    ask(chat, "Which digit?", n_predict=1)
    assert chat.cache_use().n_cell == 20 + 1
    chat.pruning = Pruning(parse_budget("1B"))
    with pytest.raises(BudgetError, match="one cell"):
        ask(chat, "Which digit?", n_predict=1)


def test_pictures_need_an_mmproj(demo_files: tuple[Path, Path], tmp_path: Path) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(demo_files[0].read_bytes())
    with VisionModel(alone, n_threads=1) as model, Context(model, n_ctx=256) as context:
        chat = session(context, "50%")
        with pytest.raises(ModelError, match="no mmproj"):
            ask(chat, "What?", picture(1))
        ask(chat, "What?", n_predict=3)
        assert chat.counters.n_turn == 1


def test_pruned_model_on_a_context_without_pruning(model: VisionModel) -> None:
    with Context(model, n_ctx=512, prune=False) as context:
        chat = session(context, "25%")
        ask(chat, "What is in picture 1?", picture(1), n_predict=2)
        assert chat.counters.n_evicted == 0


def test_a_context_beyond_the_memory_is_refused(model: VisionModel) -> None:
    with pytest.raises(ContextError, match=r"1000000000 cells takes \d+ bytes"):
        Context(model, n_ctx=10**9)


@pytest.mark.parametrize("n_predict", [0, 1, 6])
def test_the_first_token_comes_before_the_eviction(context: Context, n_predict: int) -> None:
    """It is there sooner, and neither the answer nor what is kept changes."""
    answers, kept = [], []
    for after_token in (False, True):
        chat = session(context, "25%")
        chat.clear()
        parts: list[dict[str, Any]] = [{"type": "image", "picture": picture(seed)} for seed in range(3)]
        chat.prefill([{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}])
        n_prompt = context.n_cell
        assert (chat.prune(after_token=after_token) == 0) == after_token
        n_before, stream = context.n_cell, chat.generate(n_predict=n_predict)
        answer = [next(stream)] if n_predict else []
        assert context.n_cell == n_before == (n_prompt if after_token else n_prompt // 4)
        answers.append([*answer, *stream])
        assert context.n_cell - chat.counters.n_generated == n_prompt // 4
        kept.append(context.cell_numbers())
    assert answers[0] == answers[1]
    np.testing.assert_array_equal(*kept)


def test_a_new_prompt_before_the_answer(context: Context) -> None:
    """What was put off for an answer that nobody wanted is not made up for."""
    chat = session(context, "25%")
    chat.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(1)}]}])
    chat.prune(after_token=True)
    chat.prefill([{"role": "user", "content": [{"type": "image", "picture": picture(1)}]}])
    "".join(chat.generate(n_predict=2))
    assert (chat.counters.n_eviction, chat.counters.n_restart) == (0, 0)


OPEN_AT_THE_END = """
import sys
from edge_csp import Context, Pruning, Session, VisionModel, open_session, parse_budget
with open_session(sys.argv[1], n_ctx=256, budget="20%") as session:
    of_a_closed_context = session.ask("What is in picture 1?")
    next(of_a_closed_context)
session = Session(Context(VisionModel(sys.argv[1]), n_ctx=256), pruning=Pruning(parse_budget("20%")))
stream = session.ask("What is in picture 1?")
next(stream)
"""


def test_an_answer_is_open_when_the_process_ends(demo_files: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", OPEN_AT_THE_END, str(demo_files[0])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failed_eviction_starts_over(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(cells: np.ndarray) -> None:
        raise NativeError("the device is gone", status=-5)

    chat = session(context, "25%")
    with monkeypatch.context() as patch:
        patch.setattr(context, "keep", fail)
        with pytest.raises(NativeError):
            ask(chat, "What is in picture 1?", picture(1))
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]  # what was said before is kept
    assert chat.n_token == context.n_cell == 0
    ask(chat, "What is in picture 1?")
    assert (chat.counters.n_turn, chat.counters.n_picture) == (2, 2)


def test_there_must_be_text_to_answer(context: Context) -> None:
    chat = session(context)
    with pytest.raises(TemplateError, match="does not end with text"):
        next(chat.generate())
    chat.template = ChatTemplate("{{ messages[0].content }}")  # no head of an answer after the picture
    with pytest.raises(TemplateError, match="does not end with text"):
        ask(chat, "", picture(1))
