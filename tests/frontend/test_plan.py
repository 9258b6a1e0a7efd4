"""What a plan says is what llama.cpp and libmtmd then allocate, within 5 % (most of it to the byte)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edge_csp import native, plan
from edge_csp.budget import parse_budget
from edge_csp.context import Context
from edge_csp.errors import BudgetError, ContextError, ImageError, ModelError, NativeError
from edge_csp.images import load_picture
from edge_csp.metadata import read_info
from edge_csp.model import PicturePart, VisionModel
from edge_csp.plan import Plan, make_plan
from edge_csp.policy import Observation, Span
from edge_csp.pruning import Pruning
from tests.frontend.conftest import Refuses
from tests.oracle.random_mmproj import make_mmproj
from tests.oracle.random_models import make_model

ARCHS: dict[str, dict[str, Any]] = {
    "mha": {"arch": "llama", "n_head": 4, "n_head_kv": 4},
    "gqa": {"arch": "llama", "n_head": 8, "n_head_kv": 2, "dtype": "f16"},
    "qwen2vl": {"arch": "qwen2vl", "n_head": 4, "n_head_kv": 2},
    "gemma3": {"arch": "gemma3", "n_layer": 7, "n_head": 4, "n_head_kv": 1, "head_dim": 64},
    "mamba": {"arch": "mamba"},
    "deepseek2": {"arch": "deepseek2"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / f"{name}.gguf", n_ff=256, n_vocab=1000, **kind) for name, kind in ARCHS.items()}


@contextmanager
def llama_log() -> Iterator[list[str]]:
    """What llama.cpp logs."""
    import llama_cpp

    lines: list[str] = []
    collect = llama_cpp.llama_log_callback(lambda _level, text, _data: lines.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(native._log_callback or llama_cpp.llama_log_callback(), ctypes.c_void_p(0))


def logged(lines: list[str], what: str) -> list[float]:
    """Sizes in MiB that were logged for a kind of buffer."""
    return [float(size) for size in re.findall(rf"{what} buffer size = +([\d.]+) MiB", "".join(lines))]


def close(planned: float, real: float) -> bool:
    return abs(planned - real) <= 0.05 * real


SETTINGS: list[dict[str, Any]] = [
    {"flash_attn": "off"},
    {"flash_attn": "on"},
    {"flash_attn": "on", "type_k": "q8_0", "type_v": "q8_0"},
    {"flash_attn": "off", "type_k": "q8_0", "n_batch": 64},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["mha", "gqa", "qwen2vl", "gemma3"])
def test_plan_is_what_is_allocated(models: dict[str, Path], name: str, settings: dict[str, Any]) -> None:
    for n_ctx in (300, 3000):
        planned = make_plan(models[name], budget=parse_budget("20%"), n_text=n_ctx, **settings)
        with (
            VisionModel(models[name], n_threads=1) as model,
            Context(model, n_ctx=n_ctx, prune=not planned.notes, **settings) as context,
        ):
            context.decode_tokens(range(min(64, context.n_batch)))
            real = native.memory(context.handle)
            assert planned.whole.n_ctx == context.n_ctx
        assert planned.whole.kv == real.kv
        assert close(planned.whole.compute, real.compute)
        assert planned.weights == real.weights
        assert planned.repacked == real.repacked
        assert planned.device_weights == planned.whole.device == planned.device(planned.whole) == 0


@pytest.mark.parametrize("name", ["mamba", "deepseek2", "gemma3"])
def test_caches_that_cannot_be_pruned(models: dict[str, Path], name: str) -> None:
    planned = make_plan(models[name], budget=parse_budget("20%"), n_text=2000)
    with VisionModel(models[name], n_threads=1) as model, Context(model, n_ctx=2000, prune=False) as context:
        real = native.memory(context.handle)
        reason = ""
        try:
            native.Csp.attach(context.handle).close()
        except NativeError as error:
            reason = str(error)
    if reason:
        assert planned.notes == (f"nothing can be evicted, so the whole cache counts: {reason}",)
        assert planned.n_kept == planned.n_cell == 2000
    assert planned.whole.kv == real.kv
    assert close(planned.whole.compute, real.compute)


def test_memory_is_what_the_log_says(models: dict[str, Path], demo_files: tuple[Path, Path]) -> None:
    for path in (demo_files[0], models["mha"], models["gemma3"]):
        with llama_log() as lines, VisionModel(path) as model, Context(model, n_ctx=2048, prune=False) as context:
            real = native.memory(context.handle)
        weights = logged(lines, "model")
        assert sum(weights) == pytest.approx((real.weights + real.repacked) / 2**20, abs=0.005 * len(weights))
        kv = logged(lines, "KV")
        assert sum(kv) == pytest.approx(real.kv / 2**20, abs=0.005 * len(kv))
        assert logged(lines, "compute")[-1] == pytest.approx(real.compute / 2**20, abs=0.005)


def test_further_cells(models: dict[str, Path]) -> None:
    """What every further cell takes, in a small and in a large context."""
    for name in ("mha", "gqa", "qwen2vl", "gemma3"):
        settings = {"type_k": "q8_0", "prune": False}
        planned = make_plan(models[name], budget=parse_budget("1c"), n_text=100, type_k="q8_0")
        with VisionModel(models[name], n_threads=1) as model:
            with Context(model, n_ctx=1024, **settings) as context:
                small = native.memory(context.handle)
            with Context(model, n_ctx=4096, **settings) as context:
                large = native.memory(context.handle)
        assert planned.bytes_per_cell * 3072 == large.kv - small.kv


def test_large_contexts_are_extrapolated(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    exact = make_plan(models["gemma3"], budget=parse_budget("20%"), n_text=4096)
    monkeypatch.setattr(plan, "_STEP", 1024)
    extrapolated = make_plan(models["gemma3"], budget=parse_budget("20%"), n_text=4096)
    assert extrapolated.whole.n_ctx == exact.whole.n_ctx == 4096
    assert extrapolated.whole.kv == exact.whole.kv
    assert close(extrapolated.whole.compute, exact.whole.compute)


def test_memory_of_nothing() -> None:
    with pytest.raises(NativeError, match="NULL"):
        native.memory(None)
    assert not native.is_plain(None, "token_embd.weight")


def test_where_tensors_are(demo_files: tuple[Path, Path]) -> None:
    with VisionModel(demo_files[0], no_alloc=True) as model:
        assert native.is_plain(model.handle, "token_embd.weight")  # rows are read from it, so it is never repacked
        assert not native.is_plain(model.handle, "no such tensor")


def test_read_instead_of_mapped(demo_files: tuple[Path, Path]) -> None:
    """Without mmap only one copy is held of tensors that are repacked."""
    for use_mmap in (False, True):
        planned = make_plan(demo_files[0], budget=parse_budget("20%"), n_text=100, use_mmap=use_mmap)
        with (
            llama_log() as lines,
            VisionModel(demo_files[0], use_mmap=use_mmap) as model,
            Context(model, n_ctx=256, prune=False) as context,
        ):
            real = native.memory(context.handle)
        assert ("CPU_Mapped model buffer" in "".join(lines)) == use_mmap
        assert (planned.weights, planned.repacked, planned.mapped) == (real.weights, real.repacked, use_mmap)


# Tiles, cells and positions of a picture of 64x64 and one of 200x100, by the published rules of each family, for
# patches of 8 pixels and an encoder of 64x64; where 2x2 patches become one cell, so do the 64 of a tile 16.
PICTURES: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "mlp": ((1, 64), (1, 64)),  # resized to 64x64
    "gemma3": ((1, 16), (1, 16)),
    "idefics3": ((5, 5 * 16), (3, 3 * 16)),  # longest side 128: 2x2 or 2x1 tiles, and an overview
    "internvl": ((1, 16), (9, 9 * 16)),  # grid of the nearest aspect with at most 12 tiles: 4x2, and an overview
    "qwen2vl_merger": ((1, 4 * 4), (1, 13 * 6)),  # nearest multiple of 16
    "pixtral": ((1, 8 * 8 + 7), (1, 25 * 13 + 12)),  # nearest multiple of 8, and a break after every row but the last
}


@pytest.mark.parametrize("projector", PICTURES)
def test_pictures(projector: str, demo_files: tuple[Path, Path], tmp_path: Path) -> None:
    mmproj = make_mmproj(tmp_path / "mmproj.gguf", projector, n_embd=128, n_ff=512)
    text = demo_files[0]
    for size, expected in zip(((64, 64), (200, 100)), PICTURES[projector], strict=True):
        planned = make_plan(text, mmproj, budget=parse_budget("20%"), n_image=3, image_size=size, n_text=10)
        picture = planned.picture
        assert picture is not None
        assert (picture.n_tile, picture.n_cell) == expected
        assert picture.n_pos == picture.n_cell  # but for M-RoPE
        noise = load_picture(Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)))
        with VisionModel(text, mmproj, n_threads=1) as model, native.encoder_log() as lines:
            parts = model.tokenize("<__media__>", [noise])
            tiles = [part for part in parts if isinstance(part, PicturePart)]
            for tile in tiles:
                model.encode(tile)
        assert sum(tile.n_cell for tile in tiles) == picture.n_cell
        markers = sum(len(part.tokens) for part in parts if not isinstance(part, PicturePart))
        assert (markers, planned.n_cell) == (picture.n_marker, 10 + 3 * (picture.n_cell + picture.n_marker))
        assert picture.scratch == pytest.approx(max(logged(lines, "compute")) * 2**20, abs=1)
        assert planned.embeddings == 3 * picture.n_cell * 128 * 4


def test_encoder_weights(demo_files: tuple[Path, Path]) -> None:
    planned = make_plan(*demo_files, budget=parse_budget("20%"), n_image=1)
    with native.encoder_log() as lines, VisionModel(*demo_files):
        pass
    megabytes = re.search(r"model size: +([\d.]+) MiB", "".join(lines))
    assert megabytes is not None
    assert close(planned.encoder, float(megabytes[1]) * 2**20)


def test_multimodal_positions(tmp_path: Path) -> None:
    """M-RoPE counts a picture by its longer side."""
    tokens = [chr(ord("a") + i % 26) * (i // 26 + 1) for i in range(104)]
    text = make_model(tmp_path / "m-rope.gguf", "qwen2vl", n_head=4, head_dim=32, n_vocab=len(tokens), tokens=tokens)
    mmproj = make_mmproj(tmp_path / "mmproj.gguf", "qwen2vl_merger", n_out=128)
    planned = make_plan(text, mmproj, budget=parse_budget("20%"), n_image=2, image_size=(200, 100), n_text=10)
    assert planned.picture is not None
    n_marker = planned.picture.n_marker
    assert (planned.picture.n_cell, planned.picture.n_pos) == (78, 13)
    assert (planned.n_cell, planned.n_pos) == (10 + 2 * (78 + n_marker), 10 + 2 * (13 + n_marker))


def test_no_tokenizer(models: dict[str, Path], tmp_path: Path, refuses: Refuses) -> None:
    mmproj = make_mmproj(tmp_path / "mmproj.gguf", "qwen2vl_merger")
    with refuses(ModelError, models["qwen2vl"], "has no tokenizer"):
        make_plan(models["qwen2vl"], mmproj, budget=parse_budget("20%"), n_image=1)
    with VisionModel(models["qwen2vl"]) as model, refuses(ModelError, models["qwen2vl"], "has no tokenizer"):
        model.tokenize("words")


def test_scores_of_an_eviction() -> None:
    """What the policy takes at most, as numpy counts it."""
    import tracemalloc

    shape = 4, 8, 4096
    random = np.random.default_rng(0)
    scores = random.random((*shape[:2], 3, shape[2]), np.float32)
    norms = random.random(shape, np.float32)
    tag = random.integers(0, 2, shape, np.uint8)
    pos = np.zeros(shape, np.int32) + np.arange(shape[2], dtype=np.int32)
    spans = [Span(64, is_picture=True, columns=8)] * 64
    protected = np.zeros(shape, np.bool_)
    protected[..., -1] = True
    tracemalloc.start()
    try:
        observation = Observation(tag, pos, span=pos // 64, offset=pos % 64, spans=spans, scores=scores, key_norm=norms)
        Pruning().policy.select(observation, 800, protected)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    taken = peak + scores.nbytes + norms.nbytes + tag.nbytes + pos.nbytes
    assert close(plan._score_bytes(3) * np.prod(shape), taken)


def text_plan(path: Path, n_text: int, budget: str = "20%", **settings: Any) -> Plan:
    return make_plan(path, budget=parse_budget(budget), n_text=n_text, **settings)


def test_cells(models: dict[str, Path]) -> None:
    planned = text_plan(models["mha"], 2000, "10%")
    per_cell = 3 * 2 * 4 * 32 * 2  # layers, K and V, heads, values, bytes
    assert (planned.n_cell, planned.n_kept, planned.bytes_per_cell) == (2000, 200, per_cell)
    assert planned.whole.n_ctx == 2048  # llama.cpp rounds up to 256
    assert (planned.bounded.n_cell, planned.bounded.n_ctx) == (267, 512)  # what is kept, and a third more
    assert planned.whole.kv == 2048 * per_cell
    assert planned.bounded.kv == 512 * per_cell
    assert planned.whole.ring == 3 * 4 * 32 * 32 * 4
    assert planned.whole.work == 4 * 512 * 2048 * 2  # weights of a batch in f16
    assert text_plan(models["mha"], 2000, flash_attn="on").whole.work == 0
    assert text_plan(models["mha"], 2000, type_v="f32").whole.work == 0
    assert planned.peak(planned.bounded) < planned.peak(planned.whole)
    assert text_plan(models["mha"], 2000, cells=parse_budget("1000c")).bounded.n_ctx == 1024
    assert text_plan(models["mha"], 2000, cells=parse_budget("50%")).bounded.n_ctx == 1024
    assert text_plan(models["mha"], 2000, cells=parse_budget(f"{512 * per_cell}B")).bounded.n_ctx == 512
    assert text_plan(models["mha"], 2000, cells=parse_budget("3000")).bounded.n_ctx == 3072
    assert text_plan(models["mha"], 2000, f"{10 * per_cell}B").n_kept == 10


def test_loading_may_take_the_most(models: dict[str, Path]) -> None:
    planned = text_plan(models["gqa"], 16, n_batch=1, flash_attn="on", n_window=1)
    small = replace(planned, loading=10 * planned.peak(planned.whole))
    assert small.peak(small.whole) == small.loading
    assert planned.loading == planned.repacked + read_info(models["gqa"]).tensor_bytes


def test_notes(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_plan(models["mha"], 4096).notes == ()
    assert text_plan(models["mha"], 4097).notes == (
        "the conversation takes 4097 positions, but the model was trained on 4096",
    )
    assert text_plan(models["mha"], 2000, n_ctx=1024).notes == (
        "the conversation needs 2000 cells, but the context has 1024: raise -c, or give --cells 534",
    )
    planned = text_plan(models["mha"], 4000)
    whole, bounded = planned.peak(planned.whole), planned.peak(planned.bounded)
    monkeypatch.setattr(plan, "_machine_memory", lambda: whole)
    assert text_plan(models["mha"], 4000).notes == ()
    monkeypatch.setattr(plan, "_machine_memory", lambda: bounded)
    (note,) = text_plan(models["mha"], 4000).notes
    assert note.endswith(f"{bounded} bytes of memory: it does not fit, but would with --cells 1067")
    monkeypatch.setattr(plan, "_machine_memory", lambda: bounded - 1)
    (note,) = text_plan(models["mha"], 4000).notes
    assert "it does not fit; a smaller model" in note


def test_refused(models: dict[str, Path], demo_files: tuple[Path, Path], tmp_path: Path, refuses: Refuses) -> None:
    share = parse_budget("20%")
    with refuses(ModelError, "no.gguf", "no such file"):
        make_plan(tmp_path / "no.gguf", budget=share)
    with refuses(ModelError, models["mha"], "has no mmproj"):
        make_plan(models["mha"], budget=share, n_image=1)
    with refuses(ModelError, demo_files[1], "not a text model"):
        make_plan(demo_files[1], budget=share)
    with refuses(BudgetError, "budget 10B", "768 bytes"):
        make_plan(models["qwen2vl"], budget=parse_budget("10B"), n_text=100)
    with refuses(ContextError, "3000000000 cells", 2**31 - 1):
        make_plan(models["mha"], budget=share, n_text=3_000_000_000)
    with refuses(ContextError, "a cache of 100KiB", "0 cells", "at least 16"):
        make_plan(models["mha"], budget=share, n_text=3000, cells=parse_budget("100KiB"))
    with refuses(ContextError, "0 cells"):
        make_plan(models["mha"], budget=share, n_text=0)
    with refuses(ContextError, "-1 pictures"):
        make_plan(*demo_files, budget=share, n_image=-1)
    with refuses(ImageError, "0x10", "4096"):
        make_plan(*demo_files, budget=share, n_image=1, image_size=(0, 10))
    with refuses(ContextError, "K cache type", "q9"):
        make_plan(models["mha"], budget=share, n_text=10, type_k="q9")
