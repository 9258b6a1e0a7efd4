"""Several sequences, each in a stream of its own: every one is observed, pruned and saved as if it were alone."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.errors import NativeError
from edge_csp.native import AUDIO, TEXT, Csp
from tests.native.cache import read_rows, restore_sequence, sequence_state
from tests.native.conftest import Open
from tests.native.test_keep import LAYOUTS, random_cells
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime, log_tail, relative_error

N_SEQ = 3
PROMPT = {0: 40, 1: 25, 2: 60}  # tokens of every sequence
N_KEEP = {0: 20, 1: 25, 2: 13}  # all cells of sequence 1 stay
TOLERANCE = 5e-6  # batches of other sizes round differently
SEVERAL: dict[str, Any] = {"n_ctx": 256 * N_SEQ, "kv_unified": False, "context_params": {"n_seq_max": N_SEQ}}

Tokens = dict[int, npt.NDArray[np.int64]]
Logits = dict[int, npt.NDArray[np.float32]]


def decode(runtime: Runtime, tokens: Tokens, begin: dict[int, int]) -> Logits:
    """One batch of several sequences, token after token in turns; begin: their next positions. Logits of all tokens."""
    order = sorted((i, seq_id) for seq_id, part in tokens.items() for i in range(len(part)))
    n = len(order)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = n
    batch.token = (ctypes.c_int32 * n)(*[int(tokens[seq_id][i]) for i, seq_id in order])
    batch.pos = (ctypes.c_int32 * n)(*[begin[seq_id] + i for i, seq_id in order])
    batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
    ids = [(ctypes.c_int32 * 1)(seq_id) for _, seq_id in order]
    batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*ids)
    batch.logits = (ctypes.c_int8 * n)(*[1] * n)
    status = llama_cpp.llama_decode(runtime.ctx, batch)
    assert status == 0, f"llama_decode returned {status}: {log_tail()}"
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(runtime.ctx), shape=(n, runtime.n_vocab)).copy()
    return {seq_id: logits[[at for at, (_, other) in enumerate(order) if other == seq_id]] for seq_id in tokens}


def tokens_of(seq_id: int, n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seq_id).integers(0, 96, n)


def memory_of(runtime: Runtime) -> Any:
    return llama_cpp.llama_get_memory(runtime.ctx)


def prompts() -> Tokens:
    return {seq_id: tokens_of(seq_id, n) for seq_id, n in PROMPT.items()}


def begins() -> dict[int, int]:
    return dict.fromkeys(PROMPT, 0)


@pytest.mark.parametrize("flash", [False, True])
def test_as_if_alone(model: Path, device: Open, flash: bool) -> None:
    """Logits, scores, positions: before a different eviction in each sequence, and after it."""
    follow_up = {seq_id: tokens_of(10 + seq_id, 12) for seq_id in PROMPT}

    def alone(seq_id: int) -> list[npt.NDArray[Any]]:
        with device(model, flash_attn=flash) as runtime:
            csp = Csp.attach(runtime.ctx, n_window=16)
            results: list[npt.NDArray[Any]] = [runtime.decode(tokens_of(seq_id, PROMPT[seq_id]))]
            results += [csp.scores(16), *csp.cells()]
            csp.keep(random_cells(csp, N_KEEP[seq_id], seed=seq_id))
            results += [runtime.decode(follow_up[seq_id][:6])]
            results += [runtime.decode(follow_up[seq_id][i : i + 1]) for i in range(6, 12)]
            results += [csp.scores(16), *csp.cells()]
            csp.close()
        return results

    with device(model, flash_attn=flash, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=16)
        logits = decode(runtime, prompts(), begins())
        together: dict[int, list[npt.NDArray[Any]]] = {}
        for seq_id in PROMPT:
            together[seq_id] = [logits[seq_id], csp.scores(16, seq_id=seq_id), *csp.cells(seq_id=seq_id)]
        for seq_id in PROMPT:
            csp.keep(random_cells(csp, N_KEEP[seq_id], seed=seq_id, seq_id=seq_id), seq_id=seq_id)
        begin = dict(PROMPT)
        for first, last in [(0, 6), *((i, i + 1) for i in range(6, 12))]:
            part = {seq_id: tokens[first:last] for seq_id, tokens in follow_up.items()}
            for seq_id, rows in decode(runtime, part, begin).items():
                together[seq_id].append(rows)
                begin[seq_id] += last - first
        for seq_id in PROMPT:
            together[seq_id] += [csp.scores(16, seq_id=seq_id), *csp.cells(seq_id=seq_id)]
        csp.close()
    for seq_id in PROMPT:
        for actual, expected in zip(together[seq_id], alone(seq_id), strict=True):
            assert actual.shape == expected.shape
            if actual.dtype == np.float32:
                assert relative_error(actual, expected) <= (1e-3 if flash else TOLERANCE)
            else:
                assert np.array_equal(actual, expected)


def test_the_set_of_sequences_changes(gqa: Path) -> None:
    """Graphs of as many tokens, of other sequences: the queries go to the rings of those."""
    sets = [(0,), (1,), (0, 1), (1, 2), (2,), (0, 1), (0, 1), (0, 1, 2), (2,), (1, 2)]

    with Runtime(gqa, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=4)
        decode(runtime, prompts(), begins())
        begin = dict(PROMPT)
        for step, seq_ids in enumerate(sets):
            decode(runtime, {seq_id: tokens_of(step, 1) for seq_id in seq_ids}, begin)
            for seq_id in seq_ids:
                begin[seq_id] += 1
        scores = {seq_id: csp.scores(4, 0.0, seq_id=seq_id) for seq_id in PROMPT}
        csp.close()
    for seq_id in PROMPT:
        with Runtime(gqa) as runtime:
            csp = Csp.attach(runtime.ctx, n_window=4)
            runtime.decode(tokens_of(seq_id, PROMPT[seq_id]))
            for step, seq_ids in enumerate(sets):
                if seq_id in seq_ids:
                    runtime.decode(tokens_of(step, 1))
            assert relative_error(scores[seq_id], csp.scores(4, 0.0)) <= TOLERANCE
            csp.close()


@pytest.mark.parametrize("flash", [False, True])
def test_recording_changes_no_bit(model: Path, device: Open, flash: bool) -> None:
    with device(model, type_k="f16", type_v="f16", flash_attn=flash, n_ubatch=32, **SEVERAL) as runtime:
        expected = decode(runtime, prompts(), begins())
        runtime.clear()
        csp = Csp.attach(runtime.ctx)
        actual = decode(runtime, prompts(), begins())
        csp.close()
    assert [rows.tobytes() for rows in actual.values()] == [rows.tobytes() for rows in expected.values()]


@pytest.mark.parametrize(("type_k", "type_v", "flash"), LAYOUTS)
def test_kept_rows_are_byte_identical(gqa: Path, device: Open, type_k: str, type_v: str, flash: bool) -> None:
    """Of the pruned sequence, and of the others."""
    with device(gqa, type_k=type_k, type_v=type_v, flash_attn=flash, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        before = {seq_id: read_rows(runtime, 3, 2, n, seq_id) for seq_id, n in PROMPT.items()}
        cells = random_cells(csp, 11, seed=5, seq_id=1)
        csp.keep(cells, seq_id=1)
        after = {seq_id: read_rows(runtime, 3, 2, 11 if seq_id == 1 else n, seq_id) for seq_id, n in PROMPT.items()}
        csp.close()
    index = cells[..., None].astype(np.int64)
    assert np.array_equal(after[1].k, np.take_along_axis(before[1].k, index, axis=2))
    assert np.array_equal(after[1].v, np.take_along_axis(before[1].v, index, axis=2))
    for other in (0, 2):
        assert np.array_equal(after[other].k, before[other].k)
        assert np.array_equal(after[other].v, before[other].v)


def test_modality_of_each_sequence(gqa: Path) -> None:
    with Runtime(gqa, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        csp.set_modality(AUDIO, seq_id=1)
        decode(runtime, prompts(), begins())
        tags = [np.unique(csp.cells(seq_id=seq_id)[1]).tolist() for seq_id in PROMPT]
        votes = [csp.scores(8, seq_id=seq_id).any(axis=(0, 1, 3)).tolist() for seq_id in PROMPT]
        csp.close()
    assert tags == [[TEXT], [AUDIO], [TEXT]]
    assert votes == [[True, False, False], [False, False, True], [True, False, False]]


@pytest.mark.parametrize("flash", [False, True])
def test_a_saved_sequence_goes_on_as_another(gqa: Path, device: Open, flash: bool) -> None:
    with device(gqa, type_k="f16", type_v="f16", flash_attn=flash, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        csp.keep(random_cells(csp, 13, seed=1, seq_id=2), seq_id=2)
        decode(runtime, {2: tokens_of(5, 7)}, {2: 60})
        saved = sequence_state(runtime, 2), csp.state(seq_id=2)
        cells = [array.tobytes() for array in csp.cells(seq_id=2)]
        expected = decode(runtime, {2: tokens_of(6, 9)}, {2: 67})[2]
        csp.close()
    with device(gqa, type_k="f16", type_v="f16", flash_attn=flash, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        others = prompts()
        decode(runtime, others, begins())
        restore_sequence(runtime, saved[0], 1)
        csp.set_state(saved[1], seq_id=1)
        assert [array.tobytes() for array in csp.cells(seq_id=1)] == cells
        assert csp.state(seq_id=1) == saved[1]
        assert [csp.info(seq_id=seq_id).n_kept for seq_id in PROMPT] == [0, 13, 0]
        assert [csp.info(seq_id=seq_id).n_window for seq_id in PROMPT] == [32, 0, 32]
        assert decode(runtime, {1: tokens_of(6, 9)}, {1: 67})[1].tobytes() == expected.tobytes()
        csp.close()


# --- llama_memory_* on one of several sequences ---


def check_state(csp: Csp, n_cell: list[int], n_kept: list[int]) -> None:
    infos = [csp.info(seq_id=seq_id) for seq_id in range(N_SEQ)]
    assert [info.n_cell for info in infos] == n_cell
    assert [info.n_kept for info in infos] == n_kept


def test_removal(gqa: Path) -> None:
    """Sequence 1 is pruned: the others can be cut wherever they want."""
    with Runtime(gqa, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        csp.keep(random_cells(csp, 10, seed=1, seq_id=1), seq_id=1)
        decode(runtime, {1: tokens_of(4, 5)}, {1: 25})

        def remove(*args: int) -> bool:
            return bool(llama_cpp.llama_memory_seq_rm(memory_of(runtime), *args))

        assert not remove(1, 3, 20)
        assert not remove(-1, 10, -1)
        check_state(csp, [40, 15, 60], [0, 10, 0])
        assert remove(0, 30, -1)
        assert remove(2, 10, -1)
        assert remove(1, 27, -1)
        check_state(csp, [30, 12, 10], [0, 10, 0])
        assert remove(-1, 28, -1)
        check_state(csp, [28, 12, 10], [0, 10, 0])
        assert remove(1, -1, -1)
        check_state(csp, [28, 0, 10], [0, 0, 0])
        decode(runtime, {1: tokens_of(4, 5)}, {1: 0})
        assert (csp.cells(seq_id=1)[0] == np.arange(5)).all()
        csp.keep(random_cells(csp, 3, seed=1, seq_id=1), seq_id=1)
        assert remove(-1, -1, -1)
        check_state(csp, [0, 0, 0], [0, 0, 0])
        csp.close()


def test_shifts(gqa: Path) -> None:
    with Runtime(gqa, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        csp.keep(random_cells(csp, 10, seed=1, seq_id=1), seq_id=1)
        memory = memory_of(runtime)
        before = csp.state(seq_id=1)
        llama_cpp.llama_memory_seq_add(memory, 1, 0, -1, 5)
        llama_cpp.llama_memory_seq_div(memory, 1, 0, -1, 2)
        assert llama_cpp.llama_memory_seq_pos_max(memory, 1) == 24
        assert not llama_cpp.llama_memory_can_shift(memory)
        llama_cpp.llama_memory_seq_add(memory, 0, 0, -1, 5)
        assert llama_cpp.llama_memory_seq_pos_min(memory, 0) == 5
        assert csp.state(seq_id=1) == before
        assert csp.info(seq_id=0).n_window == 0
        assert csp.info(seq_id=2).n_window == 32
        csp.close()


@pytest.mark.parametrize("at_once", [False, True])
def test_a_copy_is_pruned_like_the_original(gqa: Path, device: Open, at_once: bool) -> None:
    """And goes its own way. llama.cpp copies the rows at the next decode; at_once: keep does not wait for it."""
    with device(gqa, type_k="f16", type_v="f16", **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        csp.keep(random_cells(csp, 30, seed=1, seq_id=2), seq_id=2)
        decode(runtime, {2: tokens_of(4, 5)}, {2: 60})
        csp.keep(random_cells(csp, 9, seed=3, seq_id=0), seq_id=0)  # what it copies over was pruned otherwise
        llama_cpp.llama_memory_seq_cp(memory_of(runtime), 2, 0, -1, -1)
        check_state(csp, [35, 25, 35], [30, 0, 30])
        assert csp.state(seq_id=0) == csp.state(seq_id=2)
        assert [csp.info(seq_id=seq_id).n_window for seq_id in PROMPT] == [0, 25, 5]
        if not at_once:
            decode(runtime, {1: tokens_of(5, 1)}, {1: 25})
        for seq_id in (0, 2):
            csp.keep(random_cells(csp, 12, seed=2, seq_id=seq_id), seq_id=seq_id)
        rows = [read_rows(runtime, 3, 2, 12, seq_id) for seq_id in (0, 2)]
        assert np.array_equal(rows[0].k, rows[1].k)
        assert np.array_equal(rows[0].v, rows[1].v)
        logits = [decode(runtime, {seq_id: tokens_of(6, 4)}, {seq_id: 65})[seq_id] for seq_id in (0, 2)]
        assert logits[0].tobytes() == logits[1].tobytes()
        csp.close()


def test_a_copy_onto_a_pruned_sequence(gqa: Path) -> None:
    with Runtime(gqa, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, prompts(), begins())
        csp.keep(random_cells(csp, 30, seed=1, seq_id=2), seq_id=2)
        llama_cpp.llama_memory_seq_cp(memory_of(runtime), 0, 2, -1, -1)
        check_state(csp, [40, 25, 40], [0, 0, 0])
        assert (csp.cells(seq_id=2)[0] == np.arange(40)).all()
        csp.close()


@pytest.mark.parametrize("kv_unified", [False, True])
@pytest.mark.parametrize("seq_id", [-1, N_SEQ, 2**31 - 1, -(2**31)])
def test_no_such_sequence(gqa: Path, seq_id: int, kv_unified: bool) -> None:
    with Runtime(gqa, **SEVERAL | {"kv_unified": kv_unified}) as runtime:
        csp = Csp.attach(runtime.ctx)
        one = np.zeros((3, 2, 1), np.int32)
        for call in (
            lambda: csp.info(seq_id=seq_id),
            lambda: csp.set_modality(0, seq_id=seq_id),
            lambda: csp.scores(1, seq_id=seq_id),
            lambda: csp.select(np.zeros((3, 2, 3, 0)), k_self=1, k_cross=1, n_recent=1, seq_id=seq_id),
            lambda: csp.keep(one, seq_id=seq_id),
            lambda: csp.cells(seq_id=seq_id),
            lambda: csp.state(seq_id=seq_id),
            lambda: csp.set_state(b"csp", seq_id=seq_id),
        ):
            with pytest.raises(NativeError, match=f"seq_id is {seq_id}, allowed are 0 .. 2 .n_seq_max - 1") as caught:
                call()
            assert caught.value.status == -1
        csp.close()


def test_one_sequence_of_a_unified_cache(gqa: Path) -> None:
    """Any of them, and it has to be named."""
    with Runtime(gqa, context_params={"n_seq_max": N_SEQ}) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode(runtime, {2: tokens_of(2, 60)}, {2: 0})
        with pytest.raises(NativeError, match="the cache holds sequence 2, not 0"):
            csp.scores(8)
        csp.keep(random_cells(csp, 13, seed=2, seq_id=2), seq_id=2)
        logits = decode(runtime, {2: tokens_of(3, 5)}, {2: 60})[2]
        assert not llama_cpp.llama_memory_seq_rm(memory_of(runtime), 2, 3, 20)
        assert llama_cpp.llama_memory_seq_rm(memory_of(runtime), 1, 3, 20)  # has no cells
        csp.close()
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens_of(2, 60))
        csp.keep(random_cells(csp, 13, seed=2))
        assert runtime.decode(tokens_of(3, 5)).tobytes() == logits.tobytes()
        csp.close()


def test_window_of_a_larger_context(gqa: Path) -> None:
    """The limit is what one sequence can hold."""
    with Runtime(gqa, **SEVERAL) as runtime:
        with pytest.raises(NativeError, match=r"n_window is 257, allowed are 1 \.\. 256 .cells of a sequence"):
            Csp.attach(runtime.ctx, n_window=257)
        csp = Csp.attach(runtime.ctx)
        assert csp.info().n_cell_max == 256
        csp.close()


def test_random_steps(tmp_path: Path) -> None:
    """Decode, keep, copy, remove: positions are those of a plain list, each query gives away a mass of 1."""
    model = make_model(tmp_path / "model.gguf", "llama", n_layer=2, n_head=2, head_dim=16)
    generator = np.random.default_rng(1)
    with Runtime(model, **SEVERAL) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=8)
        positions: list[npt.NDArray[np.int64]] = [np.zeros((2, 2, 0), np.int64)] * N_SEQ

        def next_position(seq_id: int) -> int:
            return int(positions[seq_id][0, 0, -1]) + 1 if positions[seq_id].size else 0

        for _ in range(300):
            seq_id, action = int(generator.integers(N_SEQ)), generator.choice(["decode", "decode", "keep", "cp", "rm"])
            n_cell = positions[seq_id].shape[-1]
            if action == "decode":
                chosen = [s for s in range(N_SEQ) if generator.random() < 0.7 and positions[s].shape[-1] < 200]
                tokens = {s: generator.integers(0, 96, int(generator.integers(1, 20))) for s in chosen}
                if tokens:
                    decode(runtime, tokens, {s: next_position(s) for s in chosen})
                for s, part in tokens.items():
                    new = np.broadcast_to(np.arange(len(part)) + next_position(s), (2, 2, len(part)))
                    positions[s] = np.concatenate([positions[s], new], axis=-1)
                    np.testing.assert_allclose(csp.scores(1, 0.0, seq_id=s).sum(axis=(2, 3)), 1, rtol=1e-5)
            elif action == "keep" and n_cell:
                cells = random_cells(csp, int(generator.integers(1, n_cell + 1)), int(generator.integers(99)), seq_id)
                csp.keep(cells, seq_id=seq_id)
                positions[seq_id] = np.take_along_axis(positions[seq_id], cells.astype(np.int64), axis=-1)
            elif action == "cp" and n_cell:
                other = (seq_id + 1) % N_SEQ
                llama_cpp.llama_memory_seq_cp(memory_of(runtime), seq_id, other, -1, -1)
                positions[other] = positions[seq_id]
            elif action == "rm" and generator.random() < 0.3:
                llama_cpp.llama_memory_seq_rm(memory_of(runtime), seq_id, -1, -1)
                positions[seq_id] = positions[seq_id][..., :0]
            for s in range(N_SEQ):
                assert np.array_equal(csp.cells(seq_id=s)[0], positions[s])
        csp.close()
