"""`edge-csp bench quality`: statistics against brute force, protocols against sessions as users have them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_csp import Context, Pruning, Sampling, Session, VisionModel
from edge_csp.bench.quality import cache, downsample, records, report, run, specs, stats
from edge_csp.bench.quality.albums import (
    Album,
    Question,
    Shape,
    Source,
    album_files,
    draw_album,
    normalised,
    read_album,
)
from edge_csp.bench.quality.protocols import PROTOCOLS, Plan, measure
from edge_csp.bench.quality.reading import Reading, Record, chat_messages, open_context
from edge_csp.bench.quality.specs import groups, parse_spec
from edge_csp.budget import parse_budget
from edge_csp.cli import main
from edge_csp.errors import BenchError, EdgeCspError, ImageError, PolicyError
from edge_csp.metadata import read_info
from edge_csp.policy import POLICIES, CspPolicy, CuedQuotaPolicy, LookMPolicy
from tests.oracle.random_mmproj import make_mmproj
from tests.oracle.random_models import make_model
from tools.train_demo.chat import byte_alphabet

N_PREDICT = 12
GREEDY = Sampling(temperature=0)
TIMES = ("evict_s", "extra_s")


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def album() -> Album:
    return draw_album(0, 4, 8, seed=1)


def measured(model: VisionModel, album: Album, *policies: str, **what: Any) -> list[Record]:
    chosen = [parse_spec(text) for text in policies]
    budgets = [parse_budget(text) for text in what.get("budgets", ["20%"])]
    plan = Plan(chosen, budgets, what.get("protocols", PROTOCOLS), N_PREDICT, lambda *_key: True)
    with open_context(model, album, chosen, N_PREDICT) as context:
        return list(measure(context, album, plan))


def answers(found: list[Record], protocol: str) -> list[str]:
    return [record.answer for record in found if record.protocol == protocol]


# --- statistics ---


def test_interval_is_that_of_every_possible_draw() -> None:
    """Three albums can be drawn in 27 ways, which are equally likely."""
    albums = {"a": [1.0, 0.0, 1.0], "b": [0.0, -1.0], "c": [1.0, 1.0, 1.0, 0.0]}
    means = sorted(
        float(np.mean([value for name in drawn for value in albums[name]]))
        for drawn in itertools.product(albums, repeat=3)
    )
    values = [value for group in albums.values() for value in group]
    clusters = [name for name, group in albums.items() for _ in group]
    found = stats.difference(values, clusters, n_resample=200_000)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.low == means[0]  # 1/27 of the draws are "bbb", more than 2.5 %
    assert found.high == means[-1]
    assert stats.difference(values, clusters) == stats.difference(values, clusters)


def test_interval_of_many_single_questions_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.1, 1.0, 400)
    found = stats.difference(list(values), range(400), n_resample=20_000)
    error = values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.05 * error)


def test_questions_of_an_album_count_together() -> None:
    """A hundred copies of a question say no more than it does."""
    once = stats.difference([1, 0, 1, 0], "abcd")
    many = stats.difference([1, 0, 1, 0] * 100, "abcd" * 100)
    assert (once.low, once.high) == (many.low, many.high)
    assert once.high - once.low >= 0.5


def test_one_album_has_no_interval() -> None:
    found = stats.difference([1, 0, 1], "aaa")
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert report.interval(found) == "no interval"


def record(policy: str, question: int, right: bool, **what: Any) -> dict[str, Any]:
    own = Record(
        "later", policy, "20%", question, question, "", 100, 20, 20, 5.0, 15.0, "x", "y", right, True, right, 0.5, 0.01
    )
    return {"model": "demo", "n_picture": 4, "album": question % 2} | own.to_dict() | what


def test_summary_pairs_questions_and_sets_the_first_apart() -> None:
    rows = [record("a", n, n % 4 != 3) for n in range(8)] + [record("b", n, True) for n in range(6)]
    rows += [record("b", 7, True, n_cell=21)]
    found = {(one.protocol, one.policy): one for one in stats.summarise(rows, "a")}
    assert set(found) == {(p, c) for p in ("later", "later, first") for c in "ab"}
    later = found["later", "b"]
    assert (later.n, later.n_album, later.accuracy, later.full) == (6, 2, 1.0, 1.0)
    assert later.is_over
    assert not found["later", "a"].is_over
    assert later.to_reference is not None
    assert later.to_reference.mean == pytest.approx(2 / 6)  # a is wrong at 3 and 7; b has no question 6
    assert later.to_reference.low == 0  # all of album 0
    assert found["later", "a"].to_full.mean == pytest.approx(-2 / 7)
    assert (later.kept_text, later.kept_picture, later.kl, later.evict_ms) == (5, 15, 0.5, 10)


# --- answers ---


def test_divergence_and_log_probabilities(model: VisionModel) -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    assert cache.kl(np.log(p), np.log(q)) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert cache.kl(np.log(p), np.log(p)) == 0
    with Context(model, n_ctx=256) as context:
        found = cache.decode(context, (1, 2, 3))
        assert np.exp(found).sum() == pytest.approx(1)
        state = cache.save(context)
        after = cache.decode(context, (4, 5))
        context.clear()
        cache.restore(context, state)
        assert (context.n_past, context.n_cell) == (3, 3)
        assert np.array_equal(cache.decode(context, (4, 5)), after)


@pytest.mark.parametrize(("given", "other"), [("Red.", " red"), ("A  red\ncross.", "a red cross"), ("12", "12.")])
def test_answers_that_are_the_same(given: str, other: str) -> None:
    assert normalised(given) == normalised(other)
    assert Question("", "?", ("no", other)).is_right(given)
    assert not Question("", "?", ("1.2", "2")).is_right("12.")


def test_everything_kept_is_the_full_cache(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "full", "csp", budgets=["100%"])
    assert {record.protocol for record in found} == set(PROTOCOLS)
    for record in found:
        if record.protocol == "bounded" and record.policy == "csp":
            continue  # the answer has to have room: something is evicted in the last turns
        assert record.same
        assert record.answer == record.full
        assert record.right == record.full_right
        assert record.kl < 1e-9
        assert record.n_cell == record.n_token


def test_pruned_differs_and_keeps_the_budget(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "csp", "random", budgets=["40%", "5%"])
    assert {(record.policy, record.budget) for record in found} == set(
        itertools.product(("csp", "random"), ("40%", "5%"))
    )
    for record in found:
        assert record.n_cell <= record.n_budget
        assert record.kept_text + record.kept_picture == pytest.approx(record.n_cell)
        if record.protocol != "bounded":
            assert record.n_cell == record.n_budget == int(record.n_token * (0.4 if record.budget == "40%" else 0.05))
            assert record.evict_s > 0
    few = [record for record in found if record.budget == "5%"]
    for protocol in PROTOCOLS:
        assert any(not record.same for record in few if record.protocol == protocol)
    assert np.mean([record.kl for record in few]) > 0.1
    assert all(record.kl == pytest.approx(0, abs=1e-9) or not record.same or record.kl > 0 for record in found)


def live(model: VisionModel, n_ctx: int, pruning: Pruning) -> Session:
    return Session(Context(model, n_ctx=n_ctx), pruning=pruning, sampling=GREEDY)


def said(session: Session) -> str:
    return "".join(session.generate(n_predict=N_PREDICT)).strip()


def test_first_before_and_later_are_what_sessions_answer(model: VisionModel, album: Album) -> None:
    """The harness puts states back and evicts cells chosen before; here everything is read and evicted as it comes."""
    found = measured(model, album, "csp", budgets=["10%"])
    pruning = Pruning(parse_budget("10%"), CspPolicy())
    session = live(model, 1024, pruning)
    with session.context:
        first, before = [], []
        for question in album.questions:
            session.clear()
            session.pruning = pruning
            session.prefill(album.messages, add_generation_prompt=False)
            session.prefill([*album.messages, *chat_messages([question])])
            session.prune()
            first.append(said(session))
            session.clear()
            session.prefill(album.messages, add_generation_prompt=False)
            session.prune()
            session.pruning = Pruning()
            session.prefill([*album.messages, *chat_messages([question])])
            before.append(said(session))
        assert answers(found, "first") == first
        assert answers(found, "before") == before
        chat, full = [], [record.full for record in found if record.protocol == "later"]
        for n in range(1, len(album.questions) + 1):
            session.clear()
            session.pruning = pruning
            session.prefill(album.messages, add_generation_prompt=False)
            for k in range(1, n + 1):
                session.prefill([*album.messages, *chat_messages(album.questions[:k], full[: k - 1])])
                session.prune()
                session.pruning = Pruning()
            chat.append(said(session))
        assert answers(found, "later") == chat
    assert any(record.answer != record.full for record in found if record.protocol == "later")


def test_merged_rows_are_those_of_sessions(model: VisionModel, album: Album) -> None:
    """Merging policies are measured beside others that look at the same cache, and leave it to them as it was."""
    both = measured(model, album, "lookm", "lookm:merge=pivotal", "h2o", budgets=["10%"])
    found = [record for record in both if record.policy == "lookm:merge=pivotal"]
    for other in ("lookm", "h2o"):
        alone = measured(model, album, other, budgets=["10%"])
        assert [replace(one, evict_s=0) for one in both if one.policy == other] == [
            replace(one, evict_s=0) for one in alone
        ]
    pruning = Pruning(parse_budget("10%"), LookMPolicy(merge="pivotal"))
    session = live(model, 1024, pruning)
    with session.context as context:
        first, before, window = [], [], []
        for question in album.questions:
            messages = [*album.messages, *chat_messages([question])]
            session.clear()
            session.pruning = pruning
            session.prefill(album.messages, add_generation_prompt=False)
            session.prefill(messages)
            session.prune()
            first.append(said(session))
            session.clear()
            session.prefill(album.messages, add_generation_prompt=False)
            session.prune()
            session.pruning = Pruning()
            session.prefill(messages)
            before.append(said(session))
            session.clear()
            session.pruning = pruning
            session.prefill(album.messages, add_generation_prompt=False)
            session.prefill(messages)
            last = session._items[-1].key
            cells = session.select(int(session.n_token * 0.1))
            session.merge(cells)
            assert context.truncate(context.n_past - 1)
            context.keep(cells[..., :-1])
            now = cache.decode(context, (last,))
            window.append(cache.reference(context, now, N_PREDICT).text)
    assert answers(found, "first") == first
    assert answers(found, "before") == before
    assert answers(found, "window") == window
    plain = [record for record in both if record.policy == "lookm"]
    assert [one.kl for one in plain] != [one.kl for one in found]


def test_cues_are_counted(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "quota", "quota+", budgets=["20%"])
    session = live(model, 1024, Pruning(policy=CuedQuotaPolicy()))
    with session.context:
        session.prefill(album.messages, add_generation_prompt=False)
        n_token = session.counters.n_cue_token
    for one in found:
        if one.policy == "quota":
            assert (one.extra_token, one.extra_s, one.extra_picture) == (0, 0, 0)
        elif one.protocol != "bounded":
            assert (one.extra_token, one.extra_picture) == (n_token, 4)
            assert one.extra_s > 0
    turns = [one for one in found if one.protocol == "bounded" and one.policy == "quota+"]
    assert [one.extra_picture for one in turns] == [1, *[1, 0] * 3]
    assert [one.extra_token > 0 for one in turns] == [one.extra_s > 0 for one in turns] == [True, *[True, False] * 3]
    rows = [{"model": "demo", "n_picture": 4, "album": 0} | one.to_dict() for one in found]
    costs = {(one.protocol, one.policy): one for one in stats.summarise(rows)}
    assert costs["before", "quota+"].extra_token == n_token / 4
    assert costs["bounded", "quota+"].extra_token == sum(one.extra_token for one in turns) / 4
    assert costs["before", "quota"].extra_token == costs["before", "quota"].extra_s == 0


def test_cues_that_do_not_fit_are_not_asked(model: VisionModel) -> None:
    session = live(model, 256, Pruning(policy=CuedQuotaPolicy(), cells=16))
    with session.context:
        session.prefill(draw_album(0, 2, 2, seed=1).messages, add_generation_prompt=False)
        assert session.counters.n_cue_token == 0
        assert session.counters.n_eviction > 0


def test_window_reads_the_last_token_from_what_is_left(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "csp", budgets=["10%"], protocols=["window"])
    session = live(model, 1024, Pruning(policy=CspPolicy()))
    with session.context as context:
        for question, record in zip(album.questions, found, strict=True):
            session.clear()
            session.prefill(album.messages, add_generation_prompt=False)
            n_album = session.n_token
            messages = [*album.messages, *chat_messages([question])]
            session.prefill(messages)
            text = session.template.render(messages)[len(session.template.render(album.messages, False)) :]
            tail = [token for part in model.tokenize(text) for token in part.tokens]
            assert record.n_token == n_album + len(tail) == session.n_token
            cells = session.select(record.n_budget)
            session.clear()
            session.prefill(album.messages, add_generation_prompt=False)
            context.decode_tokens(tail[:-1])
            context.keep(cells[..., :-1])
            tokens = [int(cache.decode(context, tuple(tail[-1:])).argmax())]
            while not model.is_end(tokens[-1]) and len(tokens) < N_PREDICT:
                tokens.append(int(cache.decode(context, (tokens[-1],)).argmax()))
            text = b"".join(model.token_bytes(token) for token in tokens if not model.is_end(token)).decode()
            assert record.answer == text.strip()


def test_bounded_is_what_a_chat_answers(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "csp", budgets=["40%"], protocols=["bounded"])
    assert len(found) == len(album.turns) == 7
    session = live(model, 1024, Pruning(policy=CspPolicy(), cells=found[0].n_budget))
    with session.context:
        for turn, record in zip(album.turns, found, strict=True):
            parts = [*turn.parts, {"type": "text", "text": turn.question.text}]
            assert "".join(session.ask_parts(parts, n_predict=N_PREDICT)).strip() == record.answer
            if not record.same:
                break  # from here on the chat has other answers in it
    assert session.counters.n_eviction > 0


def test_reading_again(model: VisionModel, album: Album) -> None:
    """Where it never happens all is as without; where it does, answers are nearer to those of the full cache."""
    specs = ["random", "random:reread=1", "random:reread=0.05"]
    found = measured(model, album, *specs, budgets=["5%"], protocols=["before", "later"])
    found.sort(key=lambda record: (record.protocol, record.question))
    without, never, again = ([record for record in found if record.policy == spec] for spec in specs)
    for one, other in zip(without, never, strict=True):
        assert (one.protocol, one.question, one.answer, one.n_cell) == (
            other.protocol, other.question, other.answer, other.n_cell,
        )  # fmt: skip
        assert one.kl == pytest.approx(other.kl, abs=1e-3)
        assert one.extra_token == other.extra_token == 0
    assert sum(record.extra_token > 64 for record in again) > len(again) / 2
    assert all(record.extra_token == 0 for record in again if record.protocol == "later" and record.turn == 0)
    assert np.mean([record.kl for record in again]) < np.mean([record.kl for record in without])


# --- fewer picture tokens ---


def test_grid_is_the_largest_that_fits() -> None:
    for side, most in itertools.product((1, 3, 8), range(1, 70)):
        rows, columns = downsample.grid(side, most)
        assert max(rows, columns) <= side
        best = max(a * b for a in range(1, side + 1) for b in range(1, side + 1) if a * b <= most)
        assert rows * columns == best
    assert downsample.grid(8, 6) == (2, 3)


def test_average_is_over_areas() -> None:
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    assert downsample.average(grid, 4).ravel().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert downsample.average(grid, 1).ravel().tolist() == [7.5]
    assert np.array_equal(downsample.average(grid, 16), grid)
    assert downsample.average(grid, 9).ravel().tolist()[:2] == [2.5, 3.5]  # 4 into 3: neighbours share


def test_all_picture_tokens_are_the_full_cache(model: VisionModel, album: Album) -> None:
    found = measured(model, album, "downsample", budgets=["100%", "40%", "5%"])
    by_budget = {budget: [one for one in found if one.budget == budget] for budget in ("100%", "40%", "5%")}
    assert {one.protocol for one in found} == set(PROTOCOLS) - {"bounded"}
    for one in by_budget["100%"]:
        assert one.kl < 1e-6
        assert one.same
    assert all(one.n_cell <= one.n_budget for one in by_budget["40%"])
    assert all(one.kept_picture == 4 < one.n_budget < one.n_cell for one in by_budget["5%"])
    assert any(not one.same for one in by_budget["5%"])


# --- other models ---


def random_model(folder: Path, arch: str, projector: str) -> tuple[Path, Path]:
    """A model with random weights that knows all bytes, and its encoder."""
    tokens = [*byte_alphabet(), *(f"<x{i}>" for i in range(64))]
    text = make_model(folder / f"{arch}.gguf", arch, n_vocab=len(tokens), tokens=tokens, n_ff=256)
    return text, make_mmproj(folder / f"mmproj-{arch}.gguf", projector, n_out=read_info(text).n_embd_inp)


def test_mrope_pictures(tmp_path: Path, album: Album) -> None:
    """Cells of a picture share a position, so only their order tells them apart."""
    with VisionModel(*random_model(tmp_path, "qwen2vl", "qwen2vl_merger"), n_threads=1) as opened:
        found = measured(opened, album, "full", "csp", budgets=["100%", "20%"])
        for one in found:
            if one.policy == "full" or (one.budget == "100%" and one.protocol != "bounded"):
                assert one.same
                assert one.kl < 1e-6
        assert any(not one.same for one in found)
        with pytest.raises(BenchError, match="no downsample"):
            measured(opened, album, "downsample")


def test_a_cache_that_takes_nothing_back(tmp_path: Path, album: Album) -> None:
    with (
        VisionModel(*random_model(tmp_path, "lfm2", "mlp"), n_threads=1) as opened,
        pytest.raises(BenchError, match="takes nothing back"),
    ):
        measured(opened, album, "csp")


ALTERNATES = """\
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}{{ p.text if p.type == 'text' else '<__media__>' }}{% endfor %}{% endif %}
{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""
REWRITES = "{{ messages | length }}" + ALTERNATES


def test_templates(demo_files: tuple[Path, Path], album: Album) -> None:
    with VisionModel(*demo_files, n_threads=1) as opened:
        opened.info = replace(opened.info, chat_template=ALTERNATES)
        with open_context(opened, album, [], N_PREDICT) as context:
            reading = Reading(context, album, N_PREDICT)
            assert reading.messages[-1] == {"role": "assistant", "content": "Okay."}
            assert reading.text.endswith("[assistant]Okay.")
        assert all(one.same for one in measured(opened, album, "full"))
        opened.info = replace(opened.info, chat_template=REWRITES)
        with pytest.raises(BenchError, match="rewrites earlier turns"):
            measured(opened, album, "full", protocols=["before"])


# --- policies and their settings ---


def test_defaults_are_policies() -> None:
    assert [parse_spec(text).text for text in specs.DEFAULTS] == list(specs.DEFAULTS)
    assert specs.REFERENCE in specs.DEFAULTS
    assert {text.partition(":")[0] for text in specs.DEFAULTS} == {*POLICIES, "downsample"}


def test_specs() -> None:
    spec = parse_spec("csp:pool=1,n_obs=16,cross_ratio=0.3")
    assert spec.policy == CspPolicy(pool=1, cross_ratio=0.3)
    assert spec.pruning(64) == Pruning(policy=spec.policy, cells=64, n_obs=16)
    assert parse_spec("downsample").policy is None
    assert parse_spec("full").keeps_all
    several = [parse_spec(text) for text in ("csp", "random", "csp:n_obs=8", "downsample", "csp:pool=1", "full")]
    assert [[spec.text for spec in group] for group in groups(several)] == [
        ["csp", "random", "csp:pool=1", "full"],
        ["csp:n_obs=8"],
    ]


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("nonsense", PolicyError, "nonsense"),
        ("csp:depth=3", PolicyError, "depth"),
        ("csp:pool", PolicyError, "csp"),
        ("csp:pool=1,n_obs", BenchError, "n_obs is ''"),
        ("csp:pool=1,", PolicyError, "name=value"),
        ("lookm:merge=best", PolicyError, "merge is 'best'"),
        ("csp:n_obs=many", BenchError, "many"),
        ("csp:n_sink=-1", BenchError, "-1"),
        ("downsample:side=2", BenchError, "no settings"),
    ],
)
def test_specs_that_are_none(text: str, kind: type[EdgeCspError], words: str) -> None:
    with pytest.raises(kind, match=words):
        parse_spec(text)


# --- albums ---


def test_drawn_albums_are_fixed_by_their_numbers() -> None:
    one, again, other = draw_album(3, 5, 13, 1), draw_album(3, 5, 13, 1), draw_album(4, 5, 13, 1)
    assert one == again
    assert one.questions != other.questions
    assert len(one.questions) == 13
    assert len({question.kind for question in one.questions}) > 5
    assert len(one.turns) == 9
    assert [turn.question.kind.split()[0] for turn in one.turns] == ["new", *["new", "old"] * 4]
    n_picture = [sum(part["type"] == "image" for part in turn.parts) for turn in one.turns]
    assert n_picture == [1, *[1, 0] * 4]


@pytest.mark.parametrize("n", [1, 17])
def test_albums_that_cannot_be_drawn(n: int) -> None:
    with pytest.raises(BenchError, match=f"{n} pictures"):
        draw_album(0, n, 8, 1)


def write_album(folder: Path, **change: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    shown = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "This is Max."}]
    question = {"q": "What color is picture 1?", "a": ["Red.", "It is red."], "kind": "color"}
    album = {
        "messages": [{"role": "user", "content": shown}],
        "questions": [question, {"q": "Hello?", "a": "Hi."}],
        "turns": [{"content": shown, **question}, {"content": [], **question}],
    }
    (folder / "album.json").write_text(json.dumps(album | change), encoding="utf-8")
    return folder


def test_folder_of_albums(tmp_path: Path, model: VisionModel) -> None:
    for name in ("b", "a"):
        write_album(tmp_path / name)
    one, other = map(read_album, album_files(tmp_path))
    assert (one.name, other.name, one.n_picture) == ("a", "b", 1)
    assert one.questions[0] == Question("color", "What color is picture 1?", ("Red.", "It is red."))
    assert one.questions[0].is_right("it is red")
    assert album_files(tmp_path / "a") == [tmp_path / "a" / "album.json"]
    source = Source(1, 1, folder=tmp_path)
    assert source.shapes() == [Shape(1, 0, 1, 2)]
    digest = source.digest()
    write_album(tmp_path / "b", note="changed")
    assert source.digest() != digest
    found = measured(model, one, "csp", budgets=["50%"])
    assert [len(answers(found, protocol)) for protocol in PROTOCOLS] == [2] * 5


def test_embedded_album_is_such_a_folder() -> None:
    album = read_album(Path(__file__).parents[2] / "edge_csp" / "demo" / "album" / "album.json")
    assert (album.n_picture, len(album.questions), len(album.turns)) == (12, 22, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"questions": []}, "messages and questions belong together"),
        ({"messages": [], "questions": [], "turns": []}, "neither questions nor turns"),
        ({"questions": [{"q": "What?"}]}, "'a' is missing"),
        ({"questions": [{"q": "What?", "a": []}]}, "answer of 'What"),
        ({"questions": [{"q": "What?", "a": [1]}]}, "answer of 'What"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "audio"),
        ({"messages": 3}, "is no album"),
    ],
)
def test_albums_that_are_none(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(BenchError, match=words) as caught:
        read_album(write_album(tmp_path, **change) / "album.json")
    assert "album.json" in str(caught.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="is no folder"):
        album_files(tmp_path / "missing")
    with pytest.raises(BenchError, match=r"neither album\.json"):
        album_files(tmp_path)
    (write_album(tmp_path) / "red.png").unlink()
    with pytest.raises(ImageError, match=r"red\.png"):
        read_album(tmp_path / "album.json")
    (tmp_path / "album.json").write_text("{", encoding="utf-8")
    with pytest.raises(BenchError, match=r"album\.json is no album"):
        read_album(tmp_path / "album.json")


# --- runs ---


@pytest.fixture(scope="module")
def settings(demo_files: tuple[Path, Path]) -> run.Settings:
    models = (run.ModelFiles("demo", *demo_files),)
    source = Source(n_album=2, n_question=8, n_pictures=(2,))
    return run.Settings(models, source, ("full", "csp", "downsample"), ("20%",), n_predict=N_PREDICT)


@pytest.fixture(scope="module")
def whole(settings: run.Settings) -> list[dict[str, Any]]:
    return run.run(settings, None)


def timeless(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in found]
    return sorted(rows, key=records.key_of)


def lines(file: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if "settings" not in row]


def test_a_run_has_every_answer_once(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    assert len(whole) == 2 * (3 * 4 * 8 + 2 * 3)
    assert {records.key_of(row) for row in whole} == set(run.expected_keys(settings))
    assert len({records.key_of(row) for row in whole}) == len(whole)


def test_a_run_goes_on_where_it_was_stopped(
    settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    out, seen = tmp_path / "out.jsonl", list[tuple[int, int]]()
    assert len(run.run(settings, out, limit=17)) == 17
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(lines(out)[-1])[:40])
    few = replace(settings, protocols=("before",))
    assert len(run.run(few, out)) == 48
    everything = run.run(settings, out, on_progress=lambda done, n: seen.append((done, n)))
    assert timeless(everything) == timeless(whole) == timeless(lines(out))
    assert seen[0][0] >= 48
    assert seen[-1] == (len(whole), len(whole))
    before = out.read_bytes()
    assert len(run.run(few, out)) == 48
    assert lines(out) == [row for row in map(json.loads, before.decode().splitlines()) if "settings" not in row]


def test_more_policies_are_all_that_is_measured(
    settings: run.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    run.run(settings, out)
    chosen, answered, select, answer = list[str](), list[str](), Session.select, cache.answer
    monkeypatch.setattr(Session, "select", lambda self, n: chosen.append(self.pruning.policy.name) or select(self, n))
    monkeypatch.setattr(cache, "answer", lambda *given: answered.append("") or answer(*given))
    monkeypatch.setattr(downsample, "Shrunk", None)  # nothing is missing there
    more = run.run(replace(settings, policies=(*settings.policies, "streaming")), out)
    assert set(chosen) == {"streaming"}
    assert len(answered) == sum(row["policy"] == "streaming" for row in more) == len(more) - len(run.run(settings, out))


def test_parallel_is_serial(settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.run(replace(settings, n_job=2), out, limit=20)
    assert len(lines(out)) == 20
    assert timeless(run.run(replace(settings, n_job=2), out)) == timeless(whole)


def test_another_run_needs_another_file(settings: run.Settings, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run.run(replace(settings, protocols=("bounded",), policies=("full",)), out, limit=1)
    with pytest.raises(BenchError, match="seed 1, this run of 2"):
        run.run(replace(settings, source=replace(settings.source, seed=2)), out)
    with pytest.raises(BenchError, match="predict 12, this run of 3"):
        run.run(replace(settings, n_predict=3), out)
    out.write_text('{"answer": 1}\n', encoding="utf-8")
    with pytest.raises(BenchError, match=r"out\.jsonl, line 1 is no record"):
        run.run(settings, out)
    with pytest.raises(BenchError, match="cannot be written"):
        run.run(settings, tmp_path)


@pytest.mark.parametrize("n_job", [1, 2])
def test_what_fails_is_named(settings: run.Settings, demo_files: tuple[Path, Path], tmp_path: Path, n_job: int) -> None:
    (tmp_path / "text.gguf").write_bytes(demo_files[0].read_bytes())  # and nothing that reads pictures
    broken = replace(settings, models=(run.ModelFiles("text", tmp_path / "text.gguf"),), n_job=n_job)
    with pytest.raises(BenchError, match=r"^text, album \d of 2 pictures: .*has no mmproj"):
        run.run(broken, None)
    with pytest.raises(BenchError, match=r"missing\.gguf cannot be read"):
        run.run(replace(broken, models=(run.ModelFiles("x", tmp_path / "missing.gguf"),)), None)


def test_settings_that_make_no_sense(settings: run.Settings) -> None:
    for change, words in (
        ({"protocols": ("never",)}, "never"),
        ({"policies": ()}, "no policy"),
        ({"policies": ("csp", "csp")}, "twice"),
        ({"models": settings.models * 2}, "twice"),
        ({"budgets": ("200%",)}, "200%"),
    ):
        with pytest.raises(EdgeCspError, match=words):
            replace(settings, **change)


# --- what comes out ---


def test_report_and_marks(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    found = report.Summaries(settings, whole, "csp")
    text = report.markdown(found)
    assert "edge-csp bench quality -m demo --policy full --policy csp --policy downsample" in text
    for protocol in report.REPORTED:
        assert f"\n`{protocol}`: " in text
    assert text.splitlines()[2] == "<!-- Written by `edge-csp bench quality`; do not edit. -->"
    assert "## Where `csp` is behind" in text
    assert "llama-cpp-python 0.3.36" in text
    assert "/" not in text.split("## Answers")[0]  # no paths of this machine
    forged = [row | {"right": row["policy"] != "csp"} for row in whole]
    assert not report.Summaries(settings, forged, "csp").ahead()  # the others have more cells
    forged = [row | ({"n_cell": row["n_budget"]} if row["policy"] == "downsample" else {}) for row in forged]
    ahead = report.Summaries(settings, forged, "csp").ahead()
    assert {(one.policy, one.protocol) for one in ahead} == {
        ("downsample", protocol) for protocol in report.REPORTED if protocol != "bounded"
    }
    text = report.markdown(report.Summaries(settings, forged, "csp"))
    rows = [line for line in text.splitlines() if line.startswith("| `csp`") and "<br>" in line]
    assert [report.BEHIND in row for row in rows] == [protocol != "bounded" for protocol in report.REPORTED]
    assert sum(report.AHEAD in line for line in text.splitlines() if line.startswith("| `downsample`")) == len(rows) - 1
    assert "| before | 20% | `downsample` | " in text.split("## Where `csp` is behind")[1].split("## Cells")[0]
    assert "Nowhere" in report.markdown(report.Summaries(settings, whole, "full"))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["bench", "quality", "--pictures", "2,3", "--albums", "1", "--questions", "2", "--budget", "20%"]
    out, file = tmp_path / "out.jsonl", tmp_path / "quality.md"
    more = ["--policy", "full", "--policy", "csp:pool=1", "--against", "csp:pool=1"]
    assert main([*quick, *more, "--out", str(out), "--report", str(file)]) == 0
    assert "csp:pool=1" in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    assert "## Pictures 2" in text
    assert "## Pictures 3" in text
    assert "--pictures 2,3" in text
    assert len(lines(out)) == 2 * (2 * (2 * 4) + 3 + 5)


def test_the_command_names_files(settings: run.Settings, whole: list[dict[str, Any]]) -> None:
    """No folders of this machine, but those that lie below where it was run."""
    found = report.Summaries(settings, whole, None)
    files = run.ModelFiles("a", Path("models/a.gguf")), run.ModelFiles("b", Path("/home/me/b.gguf"))
    found.settings = replace(settings, models=files)
    assert report.command(found).startswith("edge-csp bench quality -m models/a.gguf -m b --policy")


def test_plot(settings: run.Settings, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write_plot(tmp_path / "quality.png", report.Summaries(settings, whole, None))
    with Image.open(tmp_path / "quality.png") as drawn:
        assert drawn.size[0] > 1000
    with pytest.raises(BenchError, match="cannot be written"):
        report.write_plot(tmp_path / "missing" / "quality.png", report.Summaries(settings, whole, None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pictures", "many"], "'many'"),
        (["--against", "csp", "--policy", "full"], "none of the policies full"),
        (["--mmproj", "a.gguf", "--mmproj", "b.gguf"], "2 --mmproj were given for 1 models"),
        (["--policy", "nonsense"], "nonsense"),
        (["-m", "missing.gguf"], "missing.gguf"),
        (["--folder", "missing"], "missing"),
    ],
)
def test_errors_take_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
