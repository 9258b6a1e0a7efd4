"""What is refused: a status and a reason, and the context computes on as if nobody had asked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from edge_csp import native
from edge_csp.errors import NativeError
from edge_csp.native import Csp
from tests.native.cache import restore_sequence, sequence_state
from tests.native.test_keep import random_cells
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime

ARGUMENT, UNSUPPORTED, STATE = -1, -2, -3
TOKENS = np.random.default_rng(1).integers(0, 96, 60)


def memory_of(runtime: Runtime) -> Any:
    return llama_cpp.llama_get_memory(runtime.ctx)


# --- contexts that cannot be pruned ---


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gemma3", "no layer has full attention"),  # only the sixth one would
        ("mamba", "the model's memory holds no KV cache"),
        ("deepseek2", "latent attention"),
    ],
)
def test_architectures(tmp_path: Path, arch: str, reason: str) -> None:
    path = make_model(tmp_path / "model.gguf", arch, n_layer=5)
    with Runtime(path) as runtime:
        expected = runtime.decode(TOKENS)
    with Runtime(path) as runtime:
        with pytest.raises(NativeError, match=reason) as caught:
            Csp.attach(runtime.ctx)
        assert caught.value.status == UNSUPPORTED
        assert np.array_equal(runtime.decode(TOKENS), expected)


def test_second_attach(gqa: Path) -> None:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        with pytest.raises(NativeError, match="already attached"):
            Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        assert csp.info().n_window == 32  # the first one goes on
        csp.close()
        csp.close()
        Csp.attach(runtime.ctx).close()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_window": 0}, "n_window is 0, allowed are 1 .. 256"),
        ({"n_window": -1}, "n_window is -1"),
        ({"n_window": 257}, "n_window is 257"),
        ({"n_modality": 1}, "n_modality is 1, allowed are 2 .. 8"),
        ({"n_modality": 9}, "n_modality is 9"),
    ],
)
def test_params(gqa: Path, params: dict[str, int], message: str) -> None:
    with Runtime(gqa) as runtime:
        with pytest.raises(NativeError, match=message) as caught:
            Csp.attach(runtime.ctx, **params)
        assert caught.value.status == ARGUMENT


# --- arguments, on a pruned cache of 40 cells ---


@pytest.fixture(scope="module")
def pruned(gqa: Path) -> Iterator[tuple[Runtime, Csp]]:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        csp.keep(random_cells(csp, 30, seed=1))
        runtime.decode(TOKENS[:10])
        yield runtime, csp
        csp.close()


@pytest.fixture(scope="module")
def expected(gqa: Path) -> npt.NDArray[np.float32]:
    """Logits of five more tokens where nothing was refused."""
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        csp.keep(random_cells(csp, 30, seed=1))
        runtime.decode(TOKENS[:10])
        logits = runtime.decode(TOKENS[:5])
        csp.close()
    return logits


def lists(*last: int, n: int = 3) -> npt.NDArray[np.int32]:
    """[3, 2, n_keep]: good ones, except for the last row."""
    good = np.broadcast_to(np.r_[np.arange(n - 1), 39], (3, 2, n)).astype(np.int32)
    if last:
        good[2, 1] = last
    return good


SCORES = np.zeros((3, 2, 3, 40), np.float32)
Call = Callable[[Csp], Any]
BAD_CALLS: dict[str, tuple[Call, str]] = {
    "modality 3": (lambda csp: csp.set_modality(3), "modality is 3, allowed are -1 .automatic. and 0 .. 2"),
    "modality -2": (lambda csp: csp.set_modality(-2), "modality is -2"),
    "n nan": (lambda csp: csp.set_softmax_n(np.nan), r"softmax_n\[0\] is -?nan"),
    "n -1": (lambda csp: csp.set_softmax_n(-1), r"softmax_n\[0\] is -1"),
    "n inf": (lambda csp: csp.set_softmax_n(np.inf), r"softmax_n\[0\] is inf"),
    "one bad n": (lambda csp: csp.set_softmax_n(np.r_[np.ones(11), -2]), r"softmax_n\[11\] is -2"),
    "5 n": (lambda csp: csp.set_softmax_n(np.ones(5)), "n_value is 5, allowed are 1 and 12"),
    "n_obs 0": (lambda csp: csp.scores(0), "n_obs is 0, allowed are 1 .. 32"),
    "n_obs 33": (lambda csp: csp.scores(33), "n_obs is 33"),
    "score n nan": (lambda csp: csp.scores(8, np.nan), "softmax_n is -?nan"),
    "score n -1": (lambda csp: csp.scores(8, -1), "softmax_n is -1"),
    "score n inf": (lambda csp: csp.scores(8, np.inf), "softmax_n is inf"),
    "k_self -1": (lambda csp: csp.select(SCORES, k_self=-1, k_cross=9, n_recent=1), "k_self -1"),
    "k_cross -1": (lambda csp: csp.select(SCORES, k_self=9, k_cross=-1, n_recent=1), "k_cross -1"),
    "n_recent 0": (lambda csp: csp.select(SCORES, k_self=9, k_cross=9, n_recent=0), "n_recent 0"),
    "n_sink -1": (lambda csp: csp.select(SCORES, k_self=9, k_cross=9, n_recent=1, n_sink=-1), "n_sink -1"),
    "sinks above budget": (
        lambda csp: csp.select(SCORES, k_self=2, k_cross=2, n_recent=1, n_sink=5),
        "row 0: 6 recent, sink and pinned cells, but a budget of 5",
    ),
    "pinned above budget": (
        lambda csp: csp.select(SCORES, k_self=2, k_cross=2, n_recent=1, pinned=np.ones((3, 2, 40), np.bool_)),
        "row 0: 40 recent, sink and pinned cells, but a budget of 5",
    ),
    "n_keep 0": (lambda csp: csp.keep(np.zeros((3, 2, 0), np.int32)), "n_keep is 0, allowed are 1 .. 40"),
    "n_keep 41": (lambda csp: csp.keep(lists(n=41)), "n_keep is 41"),
    "unsorted": (lambda csp: csp.keep(lists(1, 0, 39)), r"cells\[5\]\[1\] is 0"),
    "repeated": (lambda csp: csp.keep(lists(1, 1, 39)), r"cells\[5\]\[1\] is 1"),
    "negative": (lambda csp: csp.keep(lists(-1, 1, 39)), r"cells\[5\]\[0\] is -1"),
    "beyond": (lambda csp: csp.keep(lists(0, 1, 40)), r"cells\[5\]\[2\] is 40"),
    "without the last cell": (lambda csp: csp.keep(lists(0, 1, 38)), r"cells\[5\] ends with 38"),
    "state of 3 bytes": (lambda csp: csp.set_state(b"csp"), "truncated: 3 bytes"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_arguments(pruned: tuple[Runtime, Csp], expected: npt.NDArray[np.float32], name: str) -> None:
    runtime, csp = pruned
    before = csp.state(), csp.scores(32).tobytes()
    call, message = BAD_CALLS[name]
    with pytest.raises(NativeError, match=message) as caught:
        call(csp)
    assert caught.value.status == ARGUMENT
    assert "\n" not in str(caught.value)
    assert (csp.state(), csp.scores(32).tobytes()) == before
    begin = runtime.n_past
    assert np.array_equal(runtime.decode(TOKENS[:5]), expected)
    assert runtime.remove(begin, begin + 5)
    runtime.n_past = begin
    csp.set_state(before[0])
    refill_window(runtime, csp)


def refill_window(runtime: Runtime, csp: Csp) -> None:
    """Decode the ten tokens behind the kept cells again."""
    assert runtime.remove(60, 70)
    runtime.n_past = 60
    runtime.decode(TOKENS[:10])
    assert csp.info().n_window == 10


VOID = ctypes.c_void_p()
LAYERS = 3


def null_calls(handle: ctypes.c_void_p, ctx: Any) -> dict[str, tuple[Any, ...]]:
    """Every function with NULL in place of one pointer, or of all."""
    floats, ints, bytes_ = (ctypes.c_float * 999)(), (ctypes.c_int32 * 999)(), (ctypes.c_uint8 * 999)()
    params, select, info = native.Params(32, 3), native.SelectParams(1, 1, 1, 0), native.Info()
    return {
        "init without csp": ("llama_csp_init", ctx, params, None),
        "init without ctx": ("llama_csp_init", None, params, ctypes.byref(ctypes.c_void_p())),
        "info": ("llama_csp_get_info", VOID, 0, ctypes.byref(info)),
        "info without target": ("llama_csp_get_info", handle, 0, None),
        "modality": ("llama_csp_set_modality", VOID, 0, 0),
        "softmax_n": ("llama_csp_set_softmax_n", VOID, floats, 1),
        "softmax_n without values": ("llama_csp_set_softmax_n", handle, None, 1),
        "scores": ("llama_csp_scores", VOID, 0, 0, LAYERS, 1, 1.0, floats, 999),
        "scores without target": ("llama_csp_scores", handle, 0, 0, LAYERS, 1, 1.0, None, 720),
        "scores of a wrong size": ("llama_csp_scores", handle, 0, 0, LAYERS, 1, 1.0, floats, 719),
        "select": ("llama_csp_select", VOID, 0, 0, LAYERS, select, floats, None, ints, 999),
        "select without scores": ("llama_csp_select", handle, 0, 0, LAYERS, select, None, None, ints, 18),
        "select without target": ("llama_csp_select", handle, 0, 0, LAYERS, select, floats, None, None, 18),
        "select of a wrong size": ("llama_csp_select", handle, 0, 0, LAYERS, select, floats, None, ints, 17),
        "norms": ("llama_csp_norms", VOID, 0, 0, LAYERS, 0, floats, 999),
        "norms without target": ("llama_csp_norms", handle, 0, 0, LAYERS, 0, None, 240),
        "norms of a wrong size": ("llama_csp_norms", handle, 0, 0, LAYERS, 0, floats, 239),
        "norms of another kind": ("llama_csp_norms", handle, 0, 0, LAYERS, 2, floats, 240),
        "get_rows": ("llama_csp_get_rows", VOID, 0, 0, 0, floats, 999),
        "get_rows without target": ("llama_csp_get_rows", handle, 0, 0, 0, None, 2 * 40 * 32),
        "get_rows of neither K nor V": ("llama_csp_get_rows", handle, 0, 0, 2, floats, 999),
        "set_rows": ("llama_csp_set_rows", VOID, 0, 0, 0, floats, 999),
        "set_rows without rows": ("llama_csp_set_rows", handle, 0, 0, 0, None, 2 * 40 * 32),
        "set_rows of neither K nor V": ("llama_csp_set_rows", handle, 0, 0, -1, floats, 999),
        "keep": ("llama_csp_keep", VOID, 0, ints, 1),
        "keep without cells": ("llama_csp_keep", handle, 0, None, 1),
        "cells": ("llama_csp_cells", VOID, 0, 0, LAYERS, ints, bytes_, 999),
        "cells of a wrong size": ("llama_csp_cells", handle, 0, 0, LAYERS, ints, bytes_, 239),
        "set_state": ("llama_csp_state_set_data", VOID, 0, bytes_, 999),
        "set_state without bytes": ("llama_csp_state_set_data", handle, 0, None, 999),
    }


@pytest.mark.parametrize("name", null_calls(VOID, VOID))
def test_null(pruned: tuple[Runtime, Csp], name: str) -> None:
    runtime, csp = pruned
    before = csp.state()
    function, *arguments = null_calls(csp._handle, runtime.ctx)[name]
    assert native._call(function, *arguments) == ARGUMENT
    assert native._call("llama_csp_last_error")
    assert csp.state() == before


def test_null_where_it_means_something(pruned: tuple[Runtime, Csp]) -> None:
    _, csp = pruned
    native._call("llama_csp_free", VOID)
    assert native._call("llama_csp_state_get_size", VOID, 0) == 0
    assert native._call("llama_csp_state_get_data", VOID, 0, (ctypes.c_uint8 * 9)(), 9) == 0
    assert native._call("llama_csp_state_get_data", csp._handle, 0, (ctypes.c_uint8 * 9)(), 9) == 0
    assert native._call("llama_csp_cells", csp._handle, 0, 0, LAYERS, None, None, 6 * 40) == 0
    handle = ctypes.c_void_p(1)
    assert native._call("llama_csp_init", None, native.Params(32, 3), ctypes.byref(handle)) == ARGUMENT
    assert handle.value is None


# --- states of the cache ---


def check_state(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(NativeError, match=message) as caught:
        call()
    assert caught.value.status == STATE


def test_empty_cache(gqa: Path) -> None:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        check_state(lambda: csp.scores(1), "cache is empty")
        check_state(lambda: csp.keep(np.zeros((3, 2, 1), np.int32)), "cache is empty")
        nothing = np.zeros((3, 2, 3, 0), np.float32)
        check_state(lambda: csp.select(nothing, k_self=1, k_cross=1, n_recent=1), "cache is empty")
        assert csp.cells()[0].shape == (3, 2, 0)
        assert csp.info().n_cell == 0
        csp.set_state(csp.state())
        csp.close()


def test_scores_before_decode(gqa: Path) -> None:
    """Tokens that were decoded before attaching have no queries; their cells can be kept."""
    with Runtime(gqa) as runtime:
        runtime.decode(TOKENS)
        csp = Csp.attach(runtime.ctx)
        check_state(lambda: csp.scores(8), "has recorded no queries")
        csp.keep(random_cells(csp, 20, seed=2))
        check_state(lambda: csp.scores(8), "has recorded no queries")
        runtime.decode(TOKENS[:4])
        assert csp.scores(8).any()
        csp.close()


def test_holes(gqa: Path) -> None:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        assert runtime.remove(20, 30)
        for call in (lambda: csp.scores(8), lambda: csp.cells(), lambda: csp.keep(random_cells(csp, 20, seed=2))):
            check_state(call, "holes")
        csp.close()


def test_two_sequences(gqa: Path) -> None:
    with Runtime(gqa, context_params={"n_seq_max": 2}) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        llama_cpp.llama_memory_seq_cp(memory_of(runtime), 0, 1, 0, 60)
        for call in (lambda: csp.scores(8), lambda: csp.cells(), lambda: csp.keep(random_cells(csp, 20, seed=2))):
            check_state(call, "more than one sequence")
        llama_cpp.llama_memory_seq_rm(memory_of(runtime), 0, -1, -1)  # sequence 1 is left
        for call in (lambda: csp.scores(8), lambda: csp.cells(), lambda: csp.keep(random_cells(csp, 20, seed=2))):
            check_state(call, "the cache holds sequence 1, not 0")
        csp.keep(random_cells(csp, 20, seed=2), seq_id=1)
        csp.close()


# --- what llama_memory_* may do to a pruned cache ---


@pytest.fixture
def short(gqa: Path) -> Iterator[tuple[Runtime, Csp]]:
    """30 kept cells of the positions 0 .. 59, and ten tokens behind them."""
    with Runtime(gqa, context_params={"n_seq_max": 2}) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        csp.keep(random_cells(csp, 30, seed=1))
        runtime.decode(TOKENS[:10])
        yield runtime, csp
        csp.close()


@pytest.mark.parametrize(("begin", "end"), [(0, 1), (0, 60), (0, 69), (30, 40), (59, 60), (59, -1), (1, -1), (30, 70)])
def test_removing_kept_cells(
    short: tuple[Runtime, Csp], expected: npt.NDArray[np.float32], begin: int, end: int
) -> None:
    runtime, csp = short
    before = csp.state()
    assert not runtime.remove(begin, end)
    assert csp.state() == before
    assert np.array_equal(runtime.decode(TOKENS[:5]), expected)


def test_removing_behind_kept_cells(short: tuple[Runtime, Csp], expected: npt.NDArray[np.float32]) -> None:
    runtime, csp = short
    assert runtime.remove(66, -1)
    assert runtime.remove(60, 70)
    assert (csp.info().n_cell, csp.info().n_kept) == (30, 30)
    runtime.n_past = 60
    runtime.decode(TOKENS[:10])
    assert np.array_equal(runtime.decode(TOKENS[:5]), expected)


@pytest.mark.parametrize(("begin", "end"), [(0, -1), (-1, -1), (0, 70), (0, 1000)])
def test_removing_everything(short: tuple[Runtime, Csp], begin: int, end: int) -> None:
    runtime, csp = short
    assert runtime.remove(begin, end)
    assert (csp.info().n_cell, csp.info().n_kept, csp.info().n_window) == (0, 0, 0)
    runtime.n_past = 0
    runtime.decode(TOKENS)
    assert (csp.info().n_cell, csp.info().n_kept) == (60, 0)
    assert (csp.cells()[0] == np.arange(60)).all()


def test_a_hole_behind_kept_cells(short: tuple[Runtime, Csp]) -> None:
    """Fewer cells than positions: the kept ones are protected all the same."""
    runtime, csp = short
    assert runtime.remove(61, 66)
    for end in (60, 67, 68, 69):
        assert not runtime.remove(0, end)
    assert csp.info().n_kept == 30
    assert runtime.remove(0, 70)
    assert csp.info().n_kept == 0


def test_other_edits(short: tuple[Runtime, Csp], expected: npt.NDArray[np.float32]) -> None:
    """They return nothing: refused means without effect."""
    runtime, csp = short
    memory, before = memory_of(runtime), csp.state()
    llama_cpp.llama_memory_seq_cp(memory, 0, 1, -1, -1)
    llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 5)
    llama_cpp.llama_memory_seq_div(memory, 0, 0, -1, 2)
    assert not llama_cpp.llama_memory_can_shift(memory)
    assert llama_cpp.llama_memory_seq_pos_max(memory, 1) == -1
    assert llama_cpp.llama_memory_seq_pos_max(memory, 0) == 69
    assert csp.state() == before
    assert np.array_equal(runtime.decode(TOKENS[:5]), expected)


def test_keeping_another_sequence_drops_the_kept_cells(short: tuple[Runtime, Csp]) -> None:
    runtime, csp = short
    llama_cpp.llama_memory_seq_keep(memory_of(runtime), 1)
    assert (csp.info().n_cell, csp.info().n_kept) == (0, 0)
    assert llama_cpp.llama_memory_can_shift(memory_of(runtime))


def test_clear(short: tuple[Runtime, Csp], gqa: Path) -> None:
    runtime, csp = short
    runtime.clear()
    assert (csp.info().n_cell, csp.info().n_kept, csp.info().n_window) == (0, 0, 0)
    logits = runtime.decode(TOKENS)
    assert (csp.cells()[0] == np.arange(60)).all()
    with Runtime(gqa) as other:
        assert np.array_equal(logits, other.decode(TOKENS))


def test_detaching_leaves_a_pruned_cache(short: tuple[Runtime, Csp], expected: npt.NDArray[np.float32]) -> None:
    runtime, csp = short
    csp.close()
    assert np.array_equal(runtime.decode(TOKENS[:5]), expected)
    with pytest.raises(NativeError, match="csp or info is NULL"):
        csp.info()


def test_before_keep_everything_is_allowed(gqa: Path) -> None:
    """And the window starts anew where keys were rotated on."""
    with Runtime(gqa, context_params={"n_seq_max": 2}) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        memory = memory_of(runtime)
        assert llama_cpp.llama_memory_can_shift(memory)
        llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 5)
        assert llama_cpp.llama_memory_seq_pos_min(memory, 0) == 5
        runtime.n_past = 65
        runtime.decode(TOKENS[:3])
        assert csp.info().n_window == 3
        assert (csp.cells()[0] == np.arange(5, 68)).all()
        assert runtime.remove(5, 10)
        csp.close()


# --- the window ---


def test_non_causal_window_after_removal(gqa: Path) -> None:
    """A query saw cells behind its own; where they are gone it votes on those that are left."""
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        llama_cpp.llama_set_causal_attn(runtime.ctx, False)
        runtime.decode(TOKENS)
        llama_cpp.llama_set_causal_attn(runtime.ctx, True)
        full = csp.scores(32, 0.0)
        np.testing.assert_allclose(full.sum(axis=(2, 3)), 32, rtol=1e-5)
        assert (full[..., 0, 59] > 0).all()
        assert runtime.remove(40, 60)
        assert csp.info().n_window == 12
        scores = csp.scores(32, 0.0)
        assert scores.shape[-1] == 40
        np.testing.assert_allclose(scores.sum(axis=(2, 3)), 12, rtol=1e-5)
        runtime.n_past = 40
        runtime.decode(TOKENS[:20])
        assert csp.info().n_window == 32
        after = csp.scores(32, 0.0)
        assert after[..., 0, 59].sum() < full[..., 0, 59].sum() / 4  # the last cell was seen by its own query only
        csp.close()


def test_restored_cells_have_no_window(gqa: Path) -> None:
    """Queries of what was in the cache before do not vote on what was restored."""
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS)
        state = sequence_state(runtime)
        assert runtime.remove(-1, -1)
        runtime.n_past = 0
        runtime.decode(TOKENS[::-1])
        restore_sequence(runtime, state)
        assert csp.info().n_window == 0
        check_state(lambda: csp.scores(8), "window is empty")
        csp.close()


def test_two_contexts(gqa: Path) -> None:
    """Each with its own csp, used in turns, computes what it computes alone."""

    def alone(seed: int, n: float) -> npt.NDArray[np.float32]:
        with Runtime(gqa) as runtime:
            csp = Csp.attach(runtime.ctx, n_window=8)
            csp.set_softmax_n(n)
            runtime.decode(TOKENS)
            csp.keep(random_cells(csp, 20, seed=seed))
            logits = runtime.decode(TOKENS[:5])
            csp.close()
        return logits

    with Runtime(gqa) as first, Runtime(gqa) as second:
        pair = [(first, Csp.attach(first.ctx, n_window=8)), (second, Csp.attach(second.ctx, n_window=16))]
        for n, (_, csp) in enumerate(pair):
            csp.set_softmax_n(n)
        for runtime, _ in pair:
            runtime.decode(TOKENS)
        assert [csp.info().n_window for _, csp in pair] == [8, 16]
        for seed, (_, csp) in enumerate(pair):
            csp.keep(random_cells(csp, 20, seed=seed))
        logits = [runtime.decode(TOKENS[:5]) for runtime, _ in pair]
        for _, csp in pair:
            csp.close()
    assert np.array_equal(logits[0], alone(0, 0))
    assert np.array_equal(logits[1], alone(1, 1))
