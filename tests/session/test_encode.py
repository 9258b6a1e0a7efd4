"""A picture is encoded once: in memory, and on disk across processes, models and conversations."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from PIL import Image

from edge_csp import Context, EmbeddingCache, Picture, Pruning, Sampling, Session, VisionModel, load_picture
from edge_csp.model import PicturePart

Files = tuple[Path, Path]


def picture(seed: int) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return load_picture(Image.fromarray(pixels), name=f"{seed}.png")


def encode(model: VisionModel, *pictures: Picture) -> list[np.ndarray]:
    parts = model.tokenize("<__media__>" * len(pictures), pictures)
    return [model.encode(part) for part in parts if isinstance(part, PicturePart)]


def open_model(files: Files, cache: EmbeddingCache | None) -> VisionModel:
    return VisionModel(*files, n_threads=1, embedding_cache=cache)


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache")


def entries(cache: EmbeddingCache) -> dict[str, bytes]:
    """Embeddings in the cache; the other entries are digests of files."""
    files = cache.folder.glob("*.embd") if cache.folder.exists() else []
    return {file.name: file.read_bytes() for file in files if file.stat().st_size > 200}


def test_nothing_is_encoded_after_a_restart(demo_files: Files, cache: EmbeddingCache) -> None:
    pictures = [picture(1), picture(2), picture(3)]
    with open_model(demo_files, cache) as model:
        first = encode(model, *pictures)
        encode(model, *pictures)
        assert (model.n_encoded, model.n_from_disk) == (3, 0)
    assert len(entries(cache)) == 3
    with open_model(demo_files, EmbeddingCache(cache.folder)) as model:
        second = encode(model, *pictures, picture(4))
        encode(model, *pictures)
        assert (model.n_encoded, model.n_from_disk) == (1, 3)
        for a, b in zip(first, second, strict=False):
            assert a.dtype == b.dtype == np.float32
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


def test_a_conversation_after_a_restart(demo_files: Files, cache: EmbeddingCache) -> None:
    answers = []
    for n_encoded in (2, 0):
        with open_model(demo_files, cache) as model, Context(model, n_ctx=512) as context:
            session = Session(context, pruning=Pruning(), sampling=Sampling(temperature=0))
            answers.append("".join(session.ask("What is in picture 1?", [picture(1), picture(2)], n_predict=8)))
            answers.append("".join(session.ask("What is in picture 3?", [picture(1)], n_predict=8)))
            counters = session.counters
            assert (counters.n_picture, counters.n_encoded, counters.n_from_disk) == (3, n_encoded, 2 - n_encoded)
    assert answers[:2] == answers[2:]


def test_without_a_cache_nothing_is_written(demo_files: Files, cache_dir: Path) -> None:
    before = sorted(cache_dir.rglob("*"))
    with VisionModel(*demo_files, n_threads=1) as model:
        encode(model, picture(1))
        assert (model.n_encoded, model.n_from_disk) == (1, 0)
    assert sorted(cache_dir.rglob("*")) == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "wrong shape"])
def test_damaged_entries_are_made_again(demo_files: Files, cache: EmbeddingCache, damage: str) -> None:
    with open_model(demo_files, cache) as model:
        first = encode(model, picture(1))[0]
        part = model.tokenize("<__media__>", [picture(1)])
    [(name, data)] = entries(cache).items()
    if damage == "wrong shape":  # a sound entry, as another version of this code could write it
        sha256 = next(p.sha256 for p in part if isinstance(p, PicturePart))
        cache.put(f"{model._encoder_id} {sha256} 0", b"\0" * 400)
        assert len((cache.folder / name).read_bytes()) < len(data)
    else:
        bad = data[:-100] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1])
        (cache.folder / name).write_bytes(bad)
    for n_encoded in (1, 0):
        with open_model(demo_files, cache) as model:
            assert np.array_equal(encode(model, picture(1))[0], first)
            assert model.n_encoded == n_encoded
    assert entries(cache) == {name: data}


def test_another_encoder_finds_nothing(demo_files: Files, cache: EmbeddingCache, tmp_path: Path) -> None:
    """Two files of the same size, time and metadata, of which one weight differs."""
    other = tmp_path / "mmproj-other.gguf"
    shutil.copy2(demo_files[1], other)
    reader = gguf.GGUFReader(other, "r+")
    weights = next(tensor for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight"))
    weights.data.reshape(-1)[-1] += 1
    reader.data.flush()
    shutil.copystat(demo_files[1], other)
    with open_model(demo_files, cache) as model:
        ours = encode(model, picture(1))[0]
    with open_model((demo_files[0], other), cache) as model:
        theirs = encode(model, picture(1))[0]
        assert (model.n_encoded, model.n_from_disk) == (1, 0)
    assert not np.array_equal(ours, theirs)
    assert len(entries(cache)) == 2
    copy = tmp_path / "mmproj-copy.gguf"  # the same file elsewhere is the same encoder
    shutil.copy(demo_files[1], copy)
    with open_model((demo_files[0], copy), cache) as model:
        assert np.array_equal(encode(model, picture(1))[0], ours)
        assert (model.n_encoded, model.n_from_disk) == (0, 1)


def test_another_version_of_llama_cpp_finds_nothing(
    demo_files: Files, cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2", "1"):
        monkeypatch.setattr("llama_cpp.__version__", version)
        with open_model(demo_files, cache) as model:
            encode(model, picture(1))
    assert (model.n_encoded, model.n_from_disk) == (0, 1)
    assert len(entries(cache)) == 2


def test_what_is_not_finite_is_not_kept(
    demo_files: Files, cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisionModel, "_encode", lambda _self, _part, shape: np.full(shape, np.nan, np.float32))
    with open_model(demo_files, cache) as model:
        encode(model, picture(1))
    assert entries(cache) == {}


def test_a_cache_that_cannot_be_used_is_no_error(demo_files: Files, tmp_path: Path) -> None:
    notices: list[str] = []
    (tmp_path / "file").write_bytes(b"")
    with open_model(demo_files, EmbeddingCache(tmp_path / "file", on_notice=notices.append)) as model:
        encode(model, picture(1), picture(2))
        assert model.n_encoded == 2
    assert len(notices) == 1
