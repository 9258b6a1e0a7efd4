"""Policies, albums and questions that `edge-csp bench quality` is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edge_csp import Pruning, VisionModel
from edge_csp.bench.quality import specs
from edge_csp.bench.quality.albums import AlbumSource, Question, Shape, album_files, draw_album, read_album
from edge_csp.bench.quality.protocols import PROTOCOLS
from edge_csp.bench.quality.specs import groups, parse_spec
from edge_csp.errors import BenchError, EdgeCspError, ImageError, PolicyError
from edge_csp.policy import POLICIES, CspPolicy
from tests.bench.quality import answers, measured


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
    source = AlbumSource(1, 1, folder=tmp_path)
    assert source.shapes() == [Shape(1, 0, 1, 2)]
    digest = source.digest()
    write_album(tmp_path / "b", note="changed")
    assert source.digest() != digest
    found = measured(model, one, "csp", budgets=["50%"])
    assert [len(answers(found, protocol)) for protocol in PROTOCOLS] == [2] * 5


def test_how_answers_are_judged_and_begin(tmp_path: Path) -> None:
    own = {"q": "Who?", "a": "Max", "judge": "token", "prefix": "It is"}
    folder = write_album(tmp_path, judge="contains", questions=[own, {"q": "Hello?", "a": "Hi"}])
    album = read_album(folder / "album.json")
    assert album.questions == [
        Question("", "Who?", ("Max",), "token", "It is"),
        Question("", "Hello?", ("Hi",), "contains"),
    ]
    assert {turn.question.judge for turn in album.turns} == {"contains"}


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
        ({"judge": "strictly"}, "judge is 'strictly'"),
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
