"""Caches of all kinds: beside sliding windows and recurrent states, on several devices, of different types, and with
attention sinks of the model's own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.native import Csp
from tests.native.cache import GraphTap, read_rows, restore_sequence, sequence_state
from tests.native.conftest import Open
from tests.native.test_keep import random_cells
from tests.native.test_sequences import SEVERAL, decode, tokens_of
from tests.oracle.numpy_llama import softmax
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime, relative_error
from tests.oracle.test_numpy_llama import TOLERANCE_FLASH

N_HEAD, N_HEAD_KV, HEAD_DIM = 4, 2, 32
N_PAST = 60
TOLERANCE_ORDER = 1e-4  # f32, upstream's own: batches of other sizes, cells elsewhere, other sums (gemma3: up to 2e-5)
TOLERANCE_F16 = 2e-3  # the same with an f16 cache: a value that rounds the other way is off by 1/2048


@dataclass(frozen=True)
class Kind:
    arch: str
    path: Path
    layers: tuple[int, ...]  # with full attention, and so in the cache that is pruned

    @property
    def has_windows(self) -> bool:
        return self.arch in ("gemma3", "gpt-oss")


LAYERS = {"llama": (0, 1, 2, 3, 4, 5), "gemma3": (5,), "gpt-oss": (1, 3, 5), "lfm2": (1, 3, 5)}


@pytest.fixture(scope="session", params=LAYERS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    path = make_model(tmp_path_factory.mktemp("kinds") / "model.gguf", request.param, n_layer=6)
    return Kind(request.param, path, LAYERS[request.param])


def tokens(n: int, seed: int = 1) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 96, n)


def in_parts(runtime: Runtime, *parts: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    return np.concatenate([runtime.decode(part) for part in parts])


@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("flash", [False, True])
def test_nothing_evicted_changes_no_bit(kind: Kind, device: Open, flash: bool, swa_full: bool) -> None:
    """Nobody attached, attached, and all cells kept."""
    text = tokens(90)
    settings = {"flash_attn": flash, "n_ubatch": 16, "context_params": {"swa_full": swa_full}}
    with device(kind.path, type_k="f16", type_v="f16", **settings) as runtime:
        expected = in_parts(runtime, text[:N_PAST], text[N_PAST:80], *text[80:, None])
        runtime.clear()
        csp = Csp.attach(runtime.ctx)
        actual = [runtime.decode(text[:N_PAST])]
        assert csp.info().n_layer == len(kind.layers)
        csp.keep(random_cells(csp, N_PAST, seed=0))
        actual.append(in_parts(runtime, text[N_PAST:80], *text[80:, None]))
        assert csp.info().n_window == 32
        csp.close()
        runtime.clear()
        detached = in_parts(runtime, text[:N_PAST], text[N_PAST:80], *text[80:, None])
    assert np.concatenate(actual).tobytes() == expected.tobytes()
    assert detached.tobytes() == expected.tobytes()


@pytest.mark.parametrize("swa_full", [False, True])
def test_the_same_cells_in_all_heads(kind: Kind, device: Open, swa_full: bool) -> None:
    """That is what llama_memory_seq_rm does, as long as no window still sees the removed positions."""
    text, params = tokens(90), {"swa_full": swa_full}
    kept = np.r_[0:5, 35:N_PAST].astype(np.int32)
    with device(kind.path, n_ubatch=32, context_params=params) as runtime:
        runtime.decode(text[:N_PAST])
        assert runtime.remove(5, 35)
        expected = in_parts(runtime, text[N_PAST:80], *text[80:, None])
    with device(kind.path, n_ubatch=32, context_params=params) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(text[:N_PAST])
        csp.keep(np.broadcast_to(kept, (len(kind.layers), N_HEAD_KV, len(kept))))
        actual = in_parts(runtime, text[N_PAST:80], *text[80:, None])
        assert np.array_equal(csp.cells()[0][0, 0], np.r_[kept, N_PAST:90])
        csp.close()
    with device(kind.path, n_ubatch=32, context_params=params) as runtime:
        plain = in_parts(runtime, text[:N_PAST], text[N_PAST:])[N_PAST:]
    assert relative_error(actual, expected) <= TOLERANCE_ORDER  # new cells lie in the holes there, behind the kept here
    assert relative_error(plain, expected) > 10 * TOLERANCE_ORDER  # the removed cells matter


@pytest.mark.parametrize("n", [0.0, 1.5])
def test_scores_are_the_attention_of_the_graph(kind: Kind, device: Open, n: float) -> None:
    """And n adds to the sinks that the model has."""
    tap = GraphTap("kq_soft_max")
    with device(kind.path, n_ubatch=128, context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=20)
        csp.set_softmax_n(n)
        runtime.decode(tokens(N_PAST))
        rows = tap.attention(kind.layers, N_HEAD, n_token=N_PAST)[:, 0, :, -12:, :N_PAST]
        scores = csp.scores(12, n)
        csp.close()
    expected = rows.reshape(len(kind.layers), N_HEAD_KV, -1, 12, N_PAST).mean(axis=2).sum(axis=2)
    assert relative_error(scores[:, :, 0], expected) <= 1e-6
    assert not scores[:, :, 1:].any()


@pytest.mark.parametrize("way", ["graph", "graph-portable"])
def test_all_ways_to_score(kind: Kind, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Runtime(kind.path, type_k="f16", type_v="f16") as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        scores = [csp.scores(32, n) for n in (0.0, 0.5)]
        monkeypatch.setenv("LLAMA_CSP_SCORES", way)
        for n, expected in zip((0.0, 0.5), scores, strict=True):
            assert relative_error(csp.scores(32, n), expected) <= 1e-6
        csp.close()


def test_every_head_sees_its_own_cells(kind: Kind, device: Open) -> None:
    """The output of attention, from the queries and the rows that llama.cpp used; rows move byte for byte."""
    text, n_layer = tokens(80), len(kind.layers)
    tap = GraphTap("kq_soft_max", "kqv_out")
    with device(kind.path, context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(text[:N_PAST])
        before = read_rows(runtime, n_layer, N_HEAD_KV, N_PAST)
        cells = random_cells(csp, 25, seed=1)
        csp.keep(cells)
        runtime.decode(text[N_PAST:])
        after = read_rows(runtime, n_layer, N_HEAD_KV, 45)
        rows = tap.attention(kind.layers, N_HEAD, n_token=20)[:, 0, :, :, :45]
        out = tap.heads("kqv_out", kind.layers, N_HEAD, HEAD_DIM)
        scores = csp.scores(20, 0.0)
        csp.close()
    index = cells[..., None].astype(np.int64)
    assert np.array_equal(after.k[:, :, :25], np.take_along_axis(before.k, index, axis=2))
    assert np.array_equal(after.v[:, :, :25], np.take_along_axis(before.v, index, axis=2))
    v = np.repeat(np.ascontiguousarray(after.v).view(np.float32), N_HEAD // N_HEAD_KV, axis=1)
    assert relative_error(out, rows @ v) <= 1e-6
    assert (rows[..., :25] > 0).all()
    expected = rows.reshape(n_layer, N_HEAD_KV, -1, 20, 45).mean(axis=2).sum(axis=2)
    assert relative_error(scores[:, :, 0], expected) <= 1e-6


def test_windows_and_recurrent_states_are_left_alone(kind: Kind, device: Open) -> None:
    if kind.arch == "llama":
        pytest.skip("has none")
    with device(kind.path) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        before = others_of(runtime)
        csp.keep(random_cells(csp, 5, seed=1))
        assert others_of(runtime) == before
        csp.close()


def others_of(runtime: Runtime) -> bytes:
    """The state with LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: what upstream has beside the cache of full attention."""
    size = llama_cpp.llama_state_seq_get_size_ext(runtime.ctx, 0, 1)
    data = (ctypes.c_uint8 * size)()
    assert llama_cpp.llama_state_seq_get_data_ext(runtime.ctx, data, size, 0, 1) == size
    return bytes(data)


@pytest.mark.parametrize("flash", [False, True])
def test_a_saved_sequence_goes_on(kind: Kind, device: Open, flash: bool) -> None:
    """Bit for bit as where it was saved: its cells are the first ones again, in their order, whatever was there before.
    Of sliding windows llama.cpp saves what can still be seen, and that lay further back: its sums had another order.
    """
    settings = {"flash_attn": flash, "type_k": "f16", "type_v": "f16"}

    def follow_up(runtime: Runtime) -> list[npt.NDArray[np.float32]]:
        return [runtime.decode(part) for part in (tokens(8, 3), tokens(1, 4))]

    with device(kind.path, **settings) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        csp.keep(random_cells(csp, 20, seed=1))
        runtime.decode(tokens(9, 2))
        saved = sequence_state(runtime), csp.state()
        cells = [array.tobytes() for array in csp.cells()]
        expected = follow_up(runtime)
        csp.close()
    found = []
    for n_before in (0, 7):
        with device(kind.path, **settings) as runtime:
            csp = Csp.attach(runtime.ctx)
            if n_before:
                runtime.decode(tokens(n_before))
            restore_sequence(runtime, saved[0])
            csp.set_state(saved[1])
            assert [array.tobytes() for array in csp.cells()] == cells
            assert (csp.info().n_cell, csp.info().n_kept) == (29, 20)
            runtime.n_past = N_PAST + 9
            found.append(follow_up(runtime))
            csp.close()
    for into_empty, into_used, where_saved in zip(*found, expected, strict=True):
        assert into_empty.tobytes() == into_used.tobytes()
        if kind.has_windows:
            assert relative_error(into_empty, where_saved) <= TOLERANCE_F16
        else:
            assert into_empty.tobytes() == where_saved.tobytes()


def test_removal(kind: Kind) -> None:
    """Behind the kept cells as far as upstream allows; where it does not, nothing has changed."""
    with Runtime(kind.path) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        csp.keep(random_cells(csp, 20, seed=1))
        in_parts(runtime, tokens(9, 2)[:5], tokens(9, 2)[5:])
        before = csp.state(), sequence_state(runtime).tobytes()
        for begin, end in ((0, 30), (30, 40), (59, -1), (1, -1)):
            assert not runtime.remove(begin, end)
            assert (csp.state(), sequence_state(runtime).tobytes()) == before
        assert runtime.remove(65, -1) == (kind.arch != "lfm2")  # recurrent states cannot go back
        if kind.arch != "lfm2":
            assert csp.info().n_cell == 25
            runtime.n_past = 65
            runtime.decode(tokens(9, 2)[5:])  # the same batch in the same cells
        assert (csp.state(), sequence_state(runtime).tobytes()) == before
        memory = llama_cpp.llama_get_memory(runtime.ctx)
        llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 5)
        llama_cpp.llama_memory_seq_div(memory, 0, 0, -1, 2)
        assert not llama_cpp.llama_memory_can_shift(memory)
        assert (csp.state(), sequence_state(runtime).tobytes()) == before
        assert runtime.remove(-1, -1)
        assert (csp.info().n_cell, csp.info().n_kept, csp.info().n_window) == (0, 0, 0)
        runtime.n_past = 0
        runtime.decode(tokens(N_PAST))
        csp.keep(random_cells(csp, 20, seed=1))
        runtime.clear()
        assert (csp.info().n_cell, csp.info().n_kept, csp.info().n_window) == (0, 0, 0)
        csp.close()


def test_removal_of_a_sequence_that_cannot_be(tmp_path: Path) -> None:
    """Recurrent memory answers this; a plain cache would abort."""
    with Runtime(make_model(tmp_path / "model.gguf", "lfm2")) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        csp.keep(random_cells(csp, 20, seed=1))
        memory = llama_cpp.llama_get_memory(runtime.ctx)
        for seq_id in (1, 255, 256, 2**31 - 1):
            assert not llama_cpp.llama_memory_seq_rm(memory, seq_id, -1, -1)
        assert csp.info().n_kept == 20
        csp.close()


def test_windows_that_slide_far(kind: Kind) -> None:
    """Ten times a context full of tokens through 256 cells: positions go on counting, the windows slide."""
    with Runtime(kind.path, n_ctx=256, n_ubatch=32) as runtime:
        csp = Csp.attach(runtime.ctx)
        for step in range(50):
            assert np.isfinite(runtime.decode(tokens(50, step))).all()
            if csp.info().n_cell > 200:
                csp.keep(random_cells(csp, 100, seed=step))
        assert csp.cells()[0][..., -1].min() == 2499
        csp.close()


def test_sequences(kind: Kind, device: Open) -> None:
    """Three at a time, pruned in different ways, compute what each computes alone."""
    n_past, n_keep = {0: 40, 1: 33, 2: 60}, {0: 20, 1: 33, 2: 13}

    def alone(seq_id: int) -> list[npt.NDArray[np.float32]]:
        with device(kind.path) as runtime:
            csp = Csp.attach(runtime.ctx)
            results = [runtime.decode(tokens_of(seq_id, n_past[seq_id]))]
            csp.keep(random_cells(csp, n_keep[seq_id], seed=seq_id))
            results += [in_parts(runtime, *tokens_of(10 + seq_id, 6)[:, None]), csp.scores(16)]
            csp.close()
        return results

    with device(kind.path, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        logits = decode(runtime, {s: tokens_of(s, n) for s, n in n_past.items()}, dict.fromkeys(n_past, 0))
        together = {seq_id: [logits[seq_id]] for seq_id in n_past}
        for seq_id, n in n_keep.items():
            csp.keep(random_cells(csp, n, seed=seq_id, seq_id=seq_id), seq_id=seq_id)
        steps = []
        for i in range(6):
            part = {seq_id: tokens_of(10 + seq_id, 6)[i : i + 1] for seq_id in n_past}
            steps.append(decode(runtime, part, {seq_id: n + i for seq_id, n in n_past.items()}))
        for seq_id in n_past:
            together[seq_id].append(np.concatenate([step[seq_id] for step in steps]))
            together[seq_id].append(csp.scores(16, seq_id=seq_id))
        csp.close()
    for seq_id in n_past:
        for actual, expected in zip(together[seq_id], alone(seq_id), strict=True):
            assert relative_error(actual, expected) <= TOLERANCE_ORDER


def test_copy_of_a_sequence(kind: Kind) -> None:
    """Windows and recurrent states go along: both sides compute the same afterwards."""
    with Runtime(kind.path, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, {0: tokens_of(0, N_PAST)}, {0: 0})
        csp.keep(random_cells(csp, 30, seed=1))
        llama_cpp.llama_memory_seq_cp(llama_cpp.llama_get_memory(runtime.ctx), 0, 1, -1, -1)
        for seq_id in (0, 1):
            csp.keep(random_cells(csp, 20, seed=2, seq_id=seq_id), seq_id=seq_id)
        logits = [decode(runtime, {seq_id: tokens_of(1, 4)}, {seq_id: N_PAST})[seq_id] for seq_id in (0, 1)]
        csp.close()
    assert logits[0].tobytes() == logits[1].tobytes()


# --- layers on different devices, K and V of different types ---


@pytest.fixture
def half_on_server(rpc_device: int) -> Callable[..., Runtime]:
    """Opens a model of six layers with the last three on the RPC server."""
    devices = (ctypes.c_void_p * 2)(rpc_device, None)

    def open_model(path: Path, **settings: Any) -> Runtime:
        params = {"devices": ctypes.cast(devices, ctypes.c_void_p), "n_gpu_layers": 4}  # the output layer counts
        return Runtime(path, model_params=params, **settings)

    return open_model


TYPES = [("f16", "f16", False), ("f16", "q8_0", True), ("q8_0", "q4_0", True), ("q8_0", "f16", False)]


@pytest.mark.parametrize(("type_k", "type_v", "flash"), TYPES)
def test_partial_offload(
    kind: Kind, half_on_server: Callable[..., Runtime], type_k: str, type_v: str, flash: bool
) -> None:
    """The same cells, scores and logits as with all layers on the CPU."""
    results = []
    for open_model in (Runtime, half_on_server):
        with open_model(kind.path, type_k=type_k, type_v=type_v, flash_attn=flash) as runtime:
            csp = Csp.attach(runtime.ctx)
            logits = [runtime.decode(tokens(N_PAST))]
            scores = csp.scores(32)
            ranked = results[0][1] if results else scores  # their last bits may decide which cells stay
            csp.keep(csp.select(ranked, k_self=20, k_cross=0, n_recent=5))
            logits.append(runtime.decode(tokens(9, 2)))
            saved = csp.state()
            results.append((np.concatenate(logits), scores, saved))
            csp.close()
    (expected, expected_scores, expected_state), (logits_, scores, state) = results
    assert relative_error(scores, expected_scores) <= 1e-6
    assert relative_error(logits_, expected) <= 1e-6
    assert state == expected_state


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64: llama.cpp rotates queries, keys and values of quantised caches."""
    return make_model(tmp_path_factory.mktemp("wide") / "model.gguf", "llama", head_dim=64)


@pytest.mark.parametrize("type_k", ["q8_0", "q4_0"])
def test_scores_of_rotated_keys(wide: Path, device: Open, type_k: str) -> None:
    tap = GraphTap("kq_soft_max")
    with device(wide, type_k=type_k, type_v="f16", context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens(N_PAST))
        rows = tap.attention(range(3), N_HEAD, n_token=N_PAST)[:, 0, :, -32:, :N_PAST]
        scores = csp.scores(32, 0.0)
        csp.close()
    expected = rows.reshape(3, N_HEAD_KV, -1, 32, N_PAST).mean(axis=2).sum(axis=2)
    assert relative_error(scores[:, :, 0], expected) <= 1e-6


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "f16")])
def test_different_types_of_k_and_v(wide: Path, device: Open, type_k: str, type_v: str) -> None:
    """Evicting the same cells in all heads is removing them, in the first layer: later ones quantise small differences.

    The scores of the first layer do not know how V is stored.
    """
    text, kept = tokens(80), np.r_[0:5, 35:N_PAST].astype(np.int32)
    tap = GraphTap("kqv_out")
    settings: dict[str, Any] = {"type_k": type_k, "context_params": tap.params}

    def first_layer() -> npt.NDArray[np.float32]:
        return tap.heads("kqv_out", 1, N_HEAD, 64)

    with device(wide, type_v=type_v, flash_attn=True, **settings) as runtime:
        runtime.decode(text[:N_PAST])
        assert runtime.remove(5, 35)
        runtime.decode(text[N_PAST:])
        expected = first_layer()
    with device(wide, type_v=type_v, flash_attn=True, **settings) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(text[:N_PAST])
        scores = csp.scores(32)
        csp.keep(np.broadcast_to(kept, (3, N_HEAD_KV, len(kept))))
        runtime.decode(text[N_PAST:])
        actual = first_layer()
        csp.close()
    with device(wide, type_v="f16", **settings) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(text[:N_PAST])
        assert relative_error(scores[0], csp.scores(32)[0]) <= 1e-6
        csp.close()
    assert relative_error(actual, expected) <= TOLERANCE_FLASH  # the cells lie in another order


@pytest.mark.parametrize("n", [0.0, 2.0])
def test_sinks_of_the_model(tmp_path: Path, n: float, device: Open) -> None:
    """Attention against numpy: exp(x) / (n + exp(s) + sum exp(x))."""
    import gguf

    path = make_model(tmp_path / "model.gguf", "gpt-oss", n_layer=4)
    sinks = {t.name: t.data for t in gguf.GGUFReader(path).tensors if "attn_sinks" in t.name}
    tap = GraphTap("Qcur", "kq_soft_max")
    with device(path, n_ubatch=128, context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx)
        csp.set_softmax_n(n)
        runtime.decode(tokens(N_PAST))
        q = tap.heads("Qcur", (1, 3), N_HEAD, HEAD_DIM)
        k = np.repeat(np.ascontiguousarray(read_rows(runtime, 2, N_HEAD_KV, N_PAST).k).view(np.float32), 2, axis=1)
        rows = tap.attention((1, 3), N_HEAD, n_token=N_PAST)[:, 0, :, :, :N_PAST]
        csp.close()
    x = q @ k.transpose(0, 1, 3, 2) / np.float32(np.sqrt(HEAD_DIM))
    own = np.stack([sinks[f"blk.{il}.attn_sinks.weight"] for il in (1, 3)])
    expected = softmax(x, np.tri(N_PAST, dtype=np.bool_), (n + np.exp(own))[..., None, None])
    assert relative_error(rows, expected) <= 2e-6  # f32 rounds a logit of 8 by 5e-7
