"""`edge-csp bench quality --task text`: what is read, what is asked, and a run on a tiny model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_csp import Context, VisionModel
from edge_csp.bench.quality import cache, corpus, notes, passages, records, run, stats, text_report, texts
from edge_csp.bench.quality.albums import Album, Passage, Question
from edge_csp.bench.quality.continuing import Continued, cut
from edge_csp.bench.quality.protocols import EVERY
from edge_csp.bench.quality.reading import Reading, open_context, text_tokens
from edge_csp.bench.quality.texts import TextSource
from edge_csp.cli import main
from edge_csp.errors import BenchError
from tests.bench.quality import N_PREDICT, measured
from tests.oracle.random_models import make_model
from tools.train_demo.chat import byte_alphabet

POLICIES = ("full", "csp:pool=1", "h2o", "random")
LENGTH = 60


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights and a vocabulary of bytes."""
    tokens = [*byte_alphabet(), *(f"<x{i}>" for i in range(64))]
    path = tmp_path_factory.mktemp("text") / "tiny.gguf"
    return make_model(path, "llama", n_layer=2, n_vocab=len(tokens), tokens=tokens)


@pytest.fixture(scope="module")
def text_model(text_file: Path) -> Iterator[VisionModel]:
    with VisionModel(text_file, n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def settings(text_file: Path) -> run.Settings:
    source = TextSource(n_album=1, n_question=2, lengths=(LENGTH,))
    models = (run.ModelFiles("tiny", text_file),)
    return run.Settings(models, source, POLICIES, ("10%",), texts.PROTOCOLS, n_predict=N_PREDICT)


@pytest.fixture(scope="module")
def whole(settings: run.Settings) -> list[dict[str, Any]]:
    return run.run(settings, None)


# --- questions ---


@pytest.mark.parametrize(
    ("judge", "given", "right"),
    [
        ("exact", "Oslo.", True),
        ("exact", "in Oslo", False),
        ("contains", "She lives in OSLO, I think.", True),
        ("contains", "Oslofjord", False),
        ("token", "Osl", True),
        ("token", "Oslo", True),
        ("token", "Os", False),
        ("token", "", False),
        ("token", "Oslos", False),
    ],
)
def test_judges(judge: str, given: str, right: bool) -> None:
    assert Question("", "Where?", ("Rome", "Oslo"), judge).is_right(given) == right


def test_answers_that_begin_as_the_question_has_it(text_model: VisionModel) -> None:
    """They are those of the text with that beginning in it, and the chat goes on with them."""
    question = Question("", "Where does she live?", ("Oslo",), "contains", "She lives in")
    album = Album("one", 0, [{"role": "user", "content": "Read this."}], [question, question], [])
    with open_context(text_model, album, [], N_PREDICT) as context:
        reading = Reading(context, album, N_PREDICT)
        found = reading.asked(0)
        prompt = reading._text([question])
        assert found.begun == text_tokens(text_model, " She lives in")
        assert found.said == f"She lives in {found.full.text}"
        assert found.said in reading._text([question, question], [found.said])
        context.clear()
        now = cache.decode(context, text_tokens(text_model, f"{prompt} She lives in"))
        assert cache.reference(context, now, N_PREDICT).tokens[:5] == found.full.tokens[:5]  # rounding adds up
        assert len(found.full.tokens) > 1
    (one,) = measured(text_model, replace(album, questions=[question]), "full", protocols=["before"])
    assert (one.same, one.answer) == (True, found.full.text)


def test_a_token_is_all_that_is_asked_for(text_model: VisionModel) -> None:
    question = Question("", "Where?", ("Oslo",), "token", "In")
    assert question.said("Os") == "In Oslo."
    album = Album("one", 0, [{"role": "user", "content": "Read this."}], [question], [])
    with open_context(text_model, album, [], N_PREDICT) as context:
        assert len(Reading(context, album, N_PREDICT).asked(0).full.tokens) == 1


# --- texts ---


def test_facts_are_unlike_each_other() -> None:
    """Few guesses are right, and the first letters of a value tell it from the others."""
    facts = notes.draw_facts(random.Random(1), notes.MOST_FACTS)
    assert len({(fact.person, fact.relation.name) for fact in facts}) == notes.MOST_FACTS
    assert len({fact.person for fact in facts[: len(notes.NAMES)]}) == len(notes.NAMES)
    for relation in (*notes.RELATIONS, *notes.NEEDLES):
        assert len({value[:3] for value in relation.values}) == len(relation.values)
        assert "{n}" not in relation.other_prefix.format(n="", v="")


@pytest.mark.parametrize("n_token", [100, 1000])
def test_notes(n_token: int) -> None:
    album = notes.facts_album("a", n_token, 8, "seed")
    text = album.messages[0]["content"]
    assert 0.8 * n_token < len(text) / notes.CHARS_PER_TOKEN < 1.2 * n_token + 500
    assert len(album.questions) == 8
    assert [one.kind for one in album.questions[:2]] == ["same words", "other words"]
    for one in album.questions:
        assert one.accepted[0] in text
        assert one.judge == "token"
    assert notes.facts_album("a", n_token, 8, "seed") == album
    assert notes.facts_album("a", n_token, 8, "other") != album


def test_needles_lie_at_their_depths() -> None:
    album = notes.needle_album("a", 2000, 5, "seed")
    text = album.messages[0]["content"]
    for depth, question in zip(notes.DEPTHS, album.questions, strict=True):
        assert question.kind == f"depth {depth}%"
        relation = next(one for one in notes.NEEDLES if one.other_question == question.text)
        at = text.index(relation.fact.format(n="", v=question.accepted[0]))
        assert at / len(text) == pytest.approx(depth / 100, abs=0.07)


def test_chats_ask_about_every_turn() -> None:
    album = notes.talk_album("a", 1000, "seed")
    assert [turn.question.kind for turn in album.turns[: notes.N_TURN]] == ["new"] * notes.N_TURN
    told = [turn.parts[0]["text"] for turn in album.turns[: notes.N_TURN]]
    asked_about = []
    for turn in album.turns[notes.N_TURN :]:
        assert not turn.parts
        name = next(word.strip("?") for word in turn.question.text.split() if word.strip("?") in notes.NAMES)
        numbers = [n for n, text in enumerate(told) if name in text and turn.question.accepted[0] in text]
        begin, end = map(int, turn.question.kind.split()[1].split("-"))
        assert all(begin <= n + 1 <= end for n in numbers)
        asked_about += numbers
    assert sorted(asked_about) == list(range(notes.N_TURN))


def test_corpus() -> None:
    assert sum(map(len, corpus.prose())) > 100_000
    assert len(corpus.described()) > 100
    assert corpus.digest() == corpus.digest()


@pytest.mark.parametrize("topic", texts.PASSAGES)
def test_passages_are_cut_before_a_blank(topic: str, text_model: VisionModel) -> None:
    passage = passages.draw_passage(topic, 500, "seed")
    assert passages.draw_passage(topic, 500, "seed") == passage
    with Context(text_model, n_ctx=256) as context:
        text, ahead = cut(context, passage)
    assert 500 <= len(text_tokens(text_model, text)) < 600
    assert len(ahead) == passages.N_AHEAD + 1
    assert bytes(text_model.token_bytes(ahead[0])).isspace()
    if passage.text:
        assert passage.text.startswith(text)
        assert passage.text[len(text) :].encode().startswith(b"".join(map(text_model.token_bytes, ahead)))


def test_a_passage_that_is_too_short(text_model: VisionModel) -> None:
    with Context(text_model, n_ctx=256) as context, pytest.raises(BenchError, match="too short"):
        cut(context, Passage(100, 128, "a b " * 50))


# --- the protocol `continue` ---


def test_continuing_is_what_decoding_says(text_model: VisionModel) -> None:
    """The predictions of every token, against token after token from a session's cache."""
    passage = passages.draw_passage("prose", 300, "seed")
    album = Album("one", 0, [], [], [], replace(passage, n_ahead=40))
    found = measured(text_model, album, "full", "csp:pool=1", "random", budgets=["100%", "20%"], protocols=EVERY)
    assert [(one.policy, one.budget) for one in found] == [
        (policy, budget) for policy in ("full", "csp:pool=1", "random") for budget in ("100%", "20%")
    ]
    for one in found:
        assert isinstance(one, Continued)
        assert (one.protocol, one.n_ahead) == ("continue", 40)
        if one.policy == "full" or one.budget == "100%":
            assert one.kl < 1e-6
            assert one.agreement == 1
            assert one.nll == pytest.approx(one.full_nll, abs=1e-4)
        else:
            assert one.n_cell == one.n_budget == one.n_token // 5
            assert one.kl > 1e-3
            assert one.agreement < 1
    with Context(text_model, n_ctx=512) as context:
        text, ahead = cut(context, album.passage or passage)
        cache.decode(context, text_tokens(text_model, text))
        rows = np.array([cache.decode(context, (token,)) for token in ahead[:-1]])
    assert found[0].full_nll == pytest.approx(-rows[np.arange(40), ahead[1:]].mean(), abs=0.01)


def test_text_is_repeated_as_a_whole(text_model: VisionModel) -> None:
    """There is room for it: no token is repeated twice, as the beginnings of further parts are."""
    passage = replace(passages.draw_passage("code", 300, "seed"), n_ahead=10)
    album = Album("one", 0, [], [], [], passage)
    (one,) = measured(text_model, album, "blend+", protocols=EVERY)
    assert one.extra_token == one.n_token
    assert one.extra_s > 0


# --- questions in the window ---


def test_questions_about_text_need_no_second_reading_of_it(
    text_model: VisionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that are chosen behind the state of the album are those of sessions that have read all of it."""
    album = notes.facts_album("a", 100, 3, "seed")
    policies, what = ("csp", "blend", "keydiff", "random"), {"protocols": ["window"], "budgets": ["20%"]}
    found = measured(text_model, album, *policies, **what)
    monkeypatch.setattr(Reading, "_go_on", None)
    init = Reading.__init__

    def not_text(self: Reading, *given: Any) -> None:
        init(self, *given)
        self._is_text = False

    monkeypatch.setattr(Reading, "__init__", not_text)
    expected = measured(text_model, album, *policies, **what)
    assert len(found) == len(expected) == 3 * len(policies)
    for one, other in zip(found, expected, strict=True):
        assert (one.policy, one.question, one.n_cell) == (other.policy, other.question, other.n_cell)
        assert one.kl == pytest.approx(other.kl, rel=0.1, abs=1e-3)


# --- a run ---


def test_a_run_has_every_record_once(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    assert {records.key_of(row) for row in whole} == set(run.expected_keys(settings))
    n_pair = len(POLICIES)
    assert len(whole) == n_pair * (len(texts.PASSAGES) + 2 * 3 * 2 + 2 * notes.N_TURN)
    for row in whole:
        assert row["length"] == LENGTH
        if row["policy"] == "full":
            assert row["kl"] < 1e-6
    assert len({row["topic"] for row in whole}) == 7


def test_a_run_goes_on(settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    few = replace(settings, protocols=("continue", "before"), policies=("random",))
    out = tmp_path / "out.jsonl"
    assert len(run.run(few, out, limit=5)) == 5
    found = run.run(few, out)
    times = {"evict_s": 0, "extra_s": 0}
    expected = [row for row in whole if row["protocol"] in few.protocols and row["policy"] == "random"]
    assert sorted((row | times for row in found), key=records.key_of) == sorted(
        (row | times for row in expected), key=records.key_of
    )
    more = replace(few, source=replace(settings.source, seed=2))
    with pytest.raises(BenchError, match="seed 1, this run of 2"):
        run.run(more, out)


def test_report(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    forged = [row | ({"full_right": True} if "full_right" in row else {}) for row in whole]
    forged = [row | ({"right": row["policy"] != "random"} if "right" in row else {}) for row in forged]
    models = (*settings.models, run.ModelFiles("other", Path("other.gguf")))
    several = [row | {"model": name} for row in forged for name in ("tiny", "other")]
    found = text_report.TextSummaries(replace(settings, models=models), several, "random")
    text = text_report.markdown(found)
    assert "edge-csp bench quality -m tiny -m other" in text
    assert "--task text --lengths 60 --seed 1 --albums 1 --questions 2" in text
    for title in ("## tiny", "## other", "## All models", "## Where `random` stands", "## Cost"):
        assert title in text
    verdicts = {(one.model, one.protocol, one.budget): one for part in found.parts() for one in part.verdicts()}
    assert {key[0] for key in verdicts} == {"tiny", "other", text_report.ALL}
    before = verdicts["tiny", "before", "10%"]
    assert (before.value, before.best, before.ahead_by.mean, before.is_behind) == (0, 100, 100, True)
    assert before.policy in ("csp:pool=1", "h2o")  # and not the one with more cells
    assert "random" not in {one.policy for one in verdicts.values()}


def test_only_what_the_full_cache_gets_right_counts(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    rows = [row for row in whole if row["protocol"] == "before" and row["policy"] == "random"]
    forged = [row | {"full_right": row["question"] == 0, "right": row["question"] == 1} for row in rows]
    found = text_report.TextSummaries(settings, forged, None)
    one = found.answers.found["before", "random", "10%"]
    assert (one.n, one.accuracy) == (2, 0)
    assert "full cache right in 50.0 % of 4" in text_report.markdown(found)


def test_continuations() -> None:
    common = {"model": "m", "topic": "code", "length": 9, "n_picture": 0, "protocol": "continue", "budget": "20%"}
    common |= {"n_cell": 1, "n_token": 5, "n_budget": 1, "question": 0}
    rows = [
        common | {"policy": policy, "album": album, "kl": kl, "agreement": 0.5, "nll": 1.0 + album, "full_nll": 1.0}
        for policy, album, kl in (("a", 0, 0.1), ("a", 1, 0.3), ("b", 0, 0.2), ("b", 1, 0.6))
    ]
    one, other = stats.continuations(rows, "a")
    assert (one.policy, one.n, one.agreement.mean) == ("a", 2, 0.5)
    assert one.kl.mean == pytest.approx(0.2)
    assert one.perplexity == pytest.approx(np.exp(1.5))
    assert one.full_perplexity == pytest.approx(np.e)
    assert other.to_reference is not None
    assert other.to_reference.mean == pytest.approx(0.2)
    assert (other.to_reference.low, other.to_reference.high) == (pytest.approx(0.1), pytest.approx(0.3))


def test_command(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file, other = tmp_path / "out.jsonl", tmp_path / "text.md", tmp_path / "other.gguf"
    other.symlink_to(text_file)
    models = ["-m", str(text_file), "-m", str(other)]
    quick = ["bench", "quality", "--task", "text", *models, "--lengths", "60", "--albums", "1"]
    more = ["--questions", "1", "--budget", "20%", "--policy", "random", "--protocol", "continue,before"]
    assert main([*quick, *more, "--out", str(out), "--report", str(file)]) == 0
    assert "continue (KL)" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert all(f"## {name}\n" in text for name in ("tiny", "other", "All models"))
    settings, *rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert settings["settings"]["same"]["task"] == "text"
    assert [row["topic"] for row in rows] == ["prose", "code", "json", "chat", "facts", "needle"] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "poems"], "poems"),
        (["--task", "text"], "know English"),
        (["--task", "text", "-m", "x.gguf", "--folder", "albums"], "--folder has albums"),
        (["--task", "text", "-m", "x.gguf", "--lengths", "few"], "--lengths 'few'"),
        (["--task", "text", "-m", "x.gguf", "--lengths", "3"], "16 tokens or more"),
        (["--task", "text", "-m", "x.gguf", "--policy", "downsample"], "downsample: there is nothing"),
        (["--protocol", "continue"], "continue: there is nothing"),
        (["--task", "text", "-m", "x.gguf", "--questions", "1000"], "240 facts"),
    ],
)
def test_errors_take_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
