"""A pruned sequence is saved and restored: llama.cpp's own state, and ours beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.errors import NativeError
from edge_csp.native import AUDIO, Csp
from tests.native.cache import Bytes, restore_sequence, sequence_state
from tests.native.conftest import MODELS, Open
from tests.native.test_keep import picture, random_cells
from tests.oracle.numpy_llama import NumpyLlama
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime

TOKENS = np.random.default_rng(1).integers(0, 96, 60)
HEADER = 24  # bytes: magic, n_layer, n_head_kv, n_cell, n_kept


def prune(runtime: Runtime, csp: Csp) -> None:
    """Text, sound, 30 of 60 cells kept, a picture, text: 65 cells."""
    runtime.decode(TOKENS[:40])
    csp.set_modality(AUDIO)
    runtime.decode(TOKENS[40:])
    csp.set_modality(-1)
    csp.keep(random_cells(csp, 30, seed=1))
    runtime.decode(embd=picture_of(runtime))
    runtime.decode(TOKENS[:15])


def picture_of(runtime: Runtime) -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((20, llama_cpp.llama_model_n_embd(runtime.model)), np.float32)


CACHES = [("f32", False), ("f16", True), ("q8_0", True)]


@pytest.mark.parametrize(("cache", "flash"), CACHES)
def test_restored_sequence_goes_on(gqa: Path, device: Open, cache: str, flash: bool) -> None:
    with device(gqa, type_k=cache, type_v=cache, flash_attn=flash) as runtime:
        csp = Csp.attach(runtime.ctx)
        prune(runtime, csp)
        saved = sequence_state(runtime), csp.state()
        pos, tag = csp.cells()
        n_past = runtime.n_past
        expected = [runtime.decode(part) for part in (TOKENS[:20], TOKENS[20:21])]
        csp.close()
    assert {*np.unique(tag)} == {0, 1, 2}
    with device(gqa, type_k=cache, type_v=cache, flash_attn=flash) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS[:7])  # what was there before goes
        restore_sequence(runtime, saved[0])
        csp.set_state(saved[1])
        assert csp.state() == saved[1]
        assert [array.tobytes() for array in csp.cells()] == [pos.tobytes(), tag.tobytes()]
        assert (csp.info().n_cell, csp.info().n_kept, csp.info().n_window) == (65, 30, 0)
        assert not runtime.remove(10, 20)
        runtime.n_past = n_past
        for part, logits in zip((TOKENS[:20], TOKENS[20:21]), expected, strict=True):
            assert runtime.decode(part).tobytes() == logits.tobytes()
        assert csp.scores(32).any()
        csp.close()


def test_mrope_picture(tmp_path: Path, device: Open) -> None:
    """Cells of a picture share a position; the last kept one belongs to it."""
    path = make_model(tmp_path / "model.gguf", **MODELS["mrope"])
    y, x = np.divmod(np.arange(20), 5)
    grid = np.stack([np.full(20, 10), 10 + y, 10 + x, 0 * x])
    with device(path) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS[:10])
        runtime.decode(embd=picture(NumpyLlama(path)), positions=grid)
        csp.keep(random_cells(csp, 12, seed=3))
        saved = sequence_state(runtime), csp.state()
        cells = [array.tobytes() for array in csp.cells()]
        runtime.n_past = 15
        expected = runtime.decode(TOKENS[10:30])
        csp.close()
    with device(path) as runtime:
        csp = Csp.attach(runtime.ctx)
        restore_sequence(runtime, saved[0])
        csp.set_state(saved[1])
        assert [array.tobytes() for array in csp.cells()] == cells
        runtime.n_past = 15
        assert runtime.decode(TOKENS[10:30]).tobytes() == expected.tobytes()
        csp.close()


def test_whole_sequence(gqa: Path) -> None:
    """Nothing kept: tags are all there is to save."""
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        csp.set_modality(AUDIO)
        runtime.decode(TOKENS)
        saved = sequence_state(runtime), csp.state()
        csp.close()
    assert len(saved[1]) == HEADER + 60
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        restore_sequence(runtime, saved[0])
        csp.set_state(saved[1])
        assert (csp.cells()[1] == AUDIO).all()
        assert csp.info().n_kept == 0
        assert runtime.remove(10, 60)
        csp.close()


# --- bytes that do not fit: 65 cells, 30 of them kept ---


@dataclass
class Saved:
    runtime: Runtime
    csp: Csp
    state: bytes
    sequence: Bytes
    n_past: int


@pytest.fixture(scope="module")
def saved(gqa: Path) -> Iterator[Saved]:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        prune(runtime, csp)
        yield Saved(runtime, csp, csp.state(), sequence_state(runtime), runtime.n_past)
        csp.close()


def refuse(saved: Saved, state: bytes, message: str, status: int) -> None:
    with pytest.raises(NativeError, match=message) as caught:
        saved.csp.set_state(state)
    assert caught.value.status == status
    assert saved.csp.state() == saved.state


def with_int(state: bytes, index: int, value: int) -> bytes:
    """Another value at the index-th i32 behind the magic."""
    data = bytearray(state)
    data[8 + 4 * index : 12 + 4 * index] = value.to_bytes(4, "little", signed=True)
    return bytes(data)


def test_damaged(saved: Saved) -> None:
    state, n_pos = saved.state, 6 * 30
    assert len(state) == HEADER + 5 * n_pos + 35
    refuse(saved, b"", "truncated: 0 bytes", -1)
    refuse(saved, state[: HEADER - 1], "truncated: 23 bytes", -1)
    refuse(saved, b"x" + state[1:], "not a csp state, or of another version", -1)
    refuse(saved, state[:-1], "state has 1[0-9]* bytes, needed are|state has 9[0-9]* bytes, needed are", -1)
    refuse(saved, state + b"\0", "needed are", -1)
    refuse(saved, with_int(state, 0, 4), "another model: 4 layers x 2 KV heads, here 3 x 2", -1)
    refuse(saved, with_int(state, 1, 4), "another model: 3 layers x 4 KV heads", -1)
    refuse(saved, with_int(state, 2, 64), "state has 64 cells", -3)
    for n_kept in (-1, 66, 2**31 - 1, -(2**31)):
        refuse(saved, with_int(state, 3, n_kept), "kept", -3)
    refuse(saved, with_int(state, 3, 29), "needed are", -1)
    refuse(saved, with_int(state, 4, -1), "do not ascend .row 0, cell 0", -1)
    refuse(saved, with_int(state, 4 + 29, 0), "do not ascend .row 0, cell 29", -1)
    refuse(saved, state[:-1] + b"\3", "tag above 2", -1)
    refuse(saved, state[: HEADER + 4 * n_pos] + b"\x08" + state[HEADER + 4 * n_pos + 1 :], "tag above 2", -1)
    saved.csp.set_state(state)


def test_of_another_sequence(saved: Saved, gqa: Path) -> None:
    """As many cells, other ones kept."""
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        csp.keep(random_cells(csp, 30, seed=99))
        runtime.decode(TOKENS[:35])
        other = csp.state()
        csp.close()
    refuse(saved, other, "does not belong to this sequence", -3)


def test_of_an_empty_cache(saved: Saved, gqa: Path) -> None:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        empty = csp.state()
        with pytest.raises(NativeError, match="restore the sequence first"):
            csp.set_state(saved.state)
        csp.close()
    refuse(saved, empty, "state has 0 cells", -3)


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=8),
    cut=st.none() | st.integers(0, 10_000),
)
def test_random_damage(saved: Saved, flips: list[tuple[int, int]], cut: int | None) -> None:
    """Never a crash: refused with nothing changed, or taken as it is and harmless."""
    data = bytearray(saved.state)
    for index, mask in flips:
        data[index % len(data)] ^= mask
    state = bytes(data if cut is None else data[: cut % len(data)])
    is_taken = True
    try:
        saved.csp.set_state(state)
    except NativeError:
        is_taken = False
    assert saved.csp.state() == (state if is_taken else saved.state)
    pos, tag = saved.csp.cells()
    assert (np.diff(pos, axis=-1) >= 0).all()
    assert pos.min() >= 0
    assert tag.max() <= 2
    saved.csp.set_state(saved.state)


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=200))
def test_random_bytes(saved: Saved, data: bytes) -> None:
    with pytest.raises(NativeError):
        saved.csp.set_state(data)
    assert saved.csp.state() == saved.state
