"""keep: what the model computes afterwards, against numpy with per-head masks, and the bytes that were moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.native import IMAGE, TEXT, Csp
from tests.native.cache import read_rows
from tests.native.conftest import Open
from tests.oracle.numpy_llama import NumpyLlama
from tests.oracle.runtime import relative_error

N_PAST = 60
TOLERANCE = {"f32": 5e-5, "f16": 2e-3}


def random_cells(csp: Csp, n_keep: int, seed: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
    """Another set of cells in every layer and head; the last cell is in all of them."""
    info = csp.info(seq_id=seq_id)
    generator = np.random.default_rng(seed)
    past = np.argsort(generator.random((info.n_layer, info.n_head_kv, info.n_cell - 1)), axis=-1)[..., : n_keep - 1]
    last = np.full((*past.shape[:2], 1), info.n_cell - 1)
    return np.sort(np.concatenate([past, last], axis=-1)).astype(np.int32)


def mask_of(cells: npt.NDArray[np.int32], n_token: int) -> npt.NDArray[np.bool_]:
    """What the queries after the past may see, [n_layer, n_head_kv, n_token, n_token]."""
    mask = np.ones((*cells.shape[:2], n_token, n_token), np.bool_)
    mask[:, :, N_PAST:, :N_PAST] = False
    for il, rows in enumerate(cells):
        for head, kept in enumerate(rows):
            mask[il, head, N_PAST:, kept] = True
    return mask


@pytest.mark.parametrize("cache", TOLERANCE)
@pytest.mark.parametrize("n_keep", [1, 20, 59])
def test_later_tokens_see_the_kept_cells(model: Path, device: Open, cache: str, n_keep: int) -> None:
    tokens = np.random.default_rng(1).integers(0, 96, 90)
    oracle = NumpyLlama(model)
    with device(model, type_k=cache, type_v=cache) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens[:N_PAST])
        cells = random_cells(csp, n_keep, seed=n_keep)
        csp.keep(cells)
        logits = np.concatenate([runtime.decode(part) for part in (tokens[N_PAST:80], *tokens[80:, None])])
        csp.close()
    masked = oracle.forward(tokens, mask=mask_of(cells, 90), f16_cache=cache == "f16").logits[N_PAST:]
    assert relative_error(logits, masked) <= TOLERANCE[cache]
    full = oracle.forward(tokens, f16_cache=cache == "f16").logits[N_PAST:]
    assert relative_error(full, masked) > 10 * TOLERANCE[cache]  # the lists matter


def test_keep_twice_and_ubatches_between(model: Path, device: Open) -> None:
    """The second list names cells; what they hold is known from the first."""
    tokens = np.random.default_rng(2).integers(0, 96, 120)
    oracle = NumpyLlama(model)
    with device(model, n_ubatch=16) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens[:N_PAST])
        first = random_cells(csp, 30, seed=1)
        csp.keep(first)
        runtime.decode(tokens[N_PAST:90])
        csp.keep(random_cells(csp, 25, seed=2))
        position, _ = csp.cells()
        logits = runtime.decode(tokens[90:])
        csp.close()
    mask = mask_of(first, 120)  # the tokens between saw the first selection
    mask[:, :, 90:, :90] = False
    for index in np.ndindex(*position.shape[:2]):
        mask[index][90:, position[index]] = True
    assert relative_error(logits, oracle.forward(tokens, mask=mask).logits[90:]) <= TOLERANCE["f32"]


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_keep_all_changes_no_bit(model: Path, device: Open, cache: str, flash: bool) -> None:
    if cache == "q8_0" and not flash:
        pytest.skip("llama.cpp has no quantised V cache without flash attention")
    tokens = np.random.default_rng(3).integers(0, 96, 80)
    logits = []
    for keep in (False, True):
        with device(model, type_k=cache, type_v=cache, flash_attn=flash) as runtime:
            csp = Csp.attach(runtime.ctx)
            runtime.decode(tokens[:N_PAST])
            if keep:
                csp.keep(random_cells(csp, N_PAST, seed=0))
            logits.append(np.concatenate([runtime.decode(part) for part in (tokens[N_PAST:70], *tokens[70:, None])]))
            csp.close()
    assert np.array_equal(logits[0], logits[1])


# K type, V type, flash attention; a V cache without flash attention is transposed
LAYOUTS = [
    *[(kind, kind, True) for kind in ("f32", "f16", "bf16", "q8_0", "q4_0")],
    *[(kind, kind, False) for kind in ("f32", "f16", "bf16")],
    ("q8_0", "f16", False),
    ("q8_0", "q4_0", True),
]


@pytest.mark.parametrize(("type_k", "type_v", "flash"), LAYOUTS)
def test_kept_rows_are_byte_identical(model: Path, device: Open, type_k: str, type_v: str, flash: bool) -> None:
    tokens = np.random.default_rng(4).integers(0, 96, N_PAST)
    with device(model, type_k=type_k, type_v=type_v, flash_attn=flash) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens)
        info = csp.info()
        before = read_rows(runtime, info.n_layer, info.n_head_kv, N_PAST)
        cells = random_cells(csp, 23, seed=5)
        csp.keep(cells)
        after = read_rows(runtime, info.n_layer, info.n_head_kv, 23)
        csp.close()
    index = cells[..., None].astype(np.int64)
    assert np.array_equal(after.k, np.take_along_axis(before.k, index, axis=2))
    assert np.array_equal(after.v, np.take_along_axis(before.v, index, axis=2))
    assert not np.array_equal(after.k, before.k[:, :, :23])


def picture(oracle: NumpyLlama, n: int = 20) -> npt.NDArray[np.float32]:
    return np.random.default_rng(6).standard_normal((n, oracle.n_embd), np.float32)


def test_positions_and_tags(model: Path, device: Open) -> None:
    oracle = NumpyLlama(model)
    with device(model) as runtime:
        csp = Csp.attach(runtime.ctx)
        tokens: Any = np.arange(10)
        runtime.decode(tokens)
        positions = None
        if oracle.rope_sections:
            y, x = np.divmod(np.arange(20), 5)
            positions = np.stack([np.full(20, 10), 10 + y, 10 + x, 0 * x])
        runtime.decode(embd=picture(oracle), positions=positions)
        runtime.n_past = 15 if oracle.rope_sections else 30
        csp.set_modality(2)
        runtime.decode(tokens)
        csp.set_modality(-1)
        position, tag = csp.cells()
        image_positions = np.full(20, 10) if oracle.rope_sections else np.arange(10, 30)
        start = 15 if oracle.rope_sections else 30
        expected = np.concatenate([np.arange(10), image_positions, np.arange(start, start + 10)])
        assert (position == expected).all()
        assert (tag == np.repeat([TEXT, IMAGE, 2], [10, 20, 10])).all()

        cells = random_cells(csp, 17, seed=7)
        csp.keep(cells)
        kept_position, kept_tag = csp.cells()
        assert np.array_equal(kept_position, np.take_along_axis(position, cells, axis=-1))
        assert np.array_equal(kept_tag, np.take_along_axis(tag, cells, axis=-1))
        runtime.decode(tokens)
        new_position, new_tag = csp.cells()
        assert np.array_equal(new_position[..., :17], kept_position)
        assert (new_position[..., 17:] == np.arange(start + 10, start + 20)).all()
        assert (new_tag[..., 17:] == TEXT).all()
        info = csp.info()
        assert (info.n_cell, info.n_kept) == (27, 17)
        csp.close()


def test_pictures_in_a_grid_after_keep(device: Open, tmp_path: Path, model: Path) -> None:
    """A second picture after keep: its embeddings see the kept cells, also with M-RoPE positions."""
    oracle = NumpyLlama(model)
    first, second = picture(oracle), picture(oracle)[::-1].copy()
    text = np.random.default_rng(8).integers(0, 96, N_PAST - 20)
    is_grid = bool(oracle.rope_sections)
    y, x = np.divmod(np.arange(20), 5)

    def grid(start: int) -> npt.NDArray[np.int64]:
        return np.stack([np.full(20, start), start + y, start + x, 0 * x])

    with device(model) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(embd=first, positions=grid(0) if is_grid else None)
        start = 5 if is_grid else 20
        runtime.n_past = start
        runtime.decode(text)
        cells = random_cells(csp, 30, seed=9)
        csp.keep(cells)
        after = start + len(text)
        logits = runtime.decode(embd=second, positions=grid(after) if is_grid else None)
        csp.close()
    embd = np.concatenate([first, oracle.embed(text), second])
    if is_grid:
        time = np.arange(start, after)
        flat = np.stack([time, time, time, 0 * time])
        positions = np.concatenate([grid(0), flat, grid(after)], axis=1)
    else:
        positions = np.arange(80)
    expected = oracle.forward(embd=embd, positions=positions, mask=mask_of(cells, 80)).logits[N_PAST:]
    assert relative_error(logits, expected) <= TOLERANCE["f32"]
