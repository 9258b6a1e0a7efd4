"""Any sequence of decode, keep, undo and clear: positions, tags and counts are those of a plain model of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_csp.native import Csp
from tests.native.test_keep import random_cells
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime

N_LAYER, N_HEAD_KV, N_WINDOW, N_CELL_MAX = 2, 2, 8, 256


class Bookkeeping:
    """What the cells hold: per row a list of (position, tag)."""

    def __init__(self) -> None:
        self.rows: list[list[tuple[int, int]]] = [[] for _ in range(N_LAYER * N_HEAD_KV)]
        self.n_kept = 0
        self.window: list[int] = []  # positions of the queries

    @property
    def n_cell(self) -> int:
        return len(self.rows[0])

    @property
    def n_past(self) -> int:
        return self.rows[0][-1][0] + 1 if self.n_cell else 0

    def decode(self, n: int, tag: int) -> None:
        positions = range(self.n_past, self.n_past + n)
        self.window = [*self.window, *positions][-N_WINDOW:]
        for row in self.rows:
            row += [(pos, tag) for pos in positions]

    def keep(self, cells: np.ndarray) -> None:
        if cells.shape[-1] == self.n_cell:
            return
        lists = cells.reshape(len(self.rows), -1)
        self.rows = [[row[cell] for cell in kept] for row, kept in zip(self.rows, lists, strict=True)]
        self.n_kept, self.window = cells.shape[-1], []

    def undo(self, n: int) -> None:
        begin = self.n_past - n
        for row in self.rows:
            del row[-n:]
        self.window = [pos for pos in self.window if pos < begin]

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    path = make_model(tmp_path_factory.mktemp("cells") / "m.gguf", "llama", n_layer=N_LAYER, n_head=2, head_dim=16)
    with Runtime(path, n_ctx=N_CELL_MAX, n_ubatch=32) as opened:
        yield opened


STEPS = st.lists(
    st.tuples(st.sampled_from(["decode", "decode", "keep", "undo", "clear"]), st.integers(0, 2**16)), max_size=12
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_bookkeeping(runtime: Runtime, steps: list[tuple[str, int]]) -> None:
    runtime.clear()
    csp = Csp.attach(runtime.ctx, n_window=N_WINDOW)
    model = Bookkeeping()
    try:
        for name, number in steps:
            step(runtime, csp, model, name, number)
            check(runtime, csp, model)
    finally:
        csp.close()


def step(runtime: Runtime, csp: Csp, model: Bookkeeping, name: str, number: int) -> None:
    if name == "decode" and model.n_cell < N_CELL_MAX:
        n = 1 + number % min(40, N_CELL_MAX - model.n_cell)
        csp.set_modality(number % 3)
        runtime.decode(np.arange(n) % 96)
        model.decode(n, number % 3)
    elif name == "keep" and model.n_cell:
        cells = random_cells(csp, 1 + number % model.n_cell, seed=number)
        csp.keep(cells)
        model.keep(cells)
    elif name == "undo" and model.n_cell > model.n_kept:
        n = 1 + number % (model.n_cell - model.n_kept)
        assert runtime.remove(model.n_past - n, -1)
        model.undo(n)
        runtime.n_past = model.n_past
    elif name == "clear":
        runtime.clear()
        model.clear()


def check(runtime: Runtime, csp: Csp, model: Bookkeeping) -> None:
    info = csp.info()
    assert (info.n_cell, info.n_kept, info.n_cell_max) == (model.n_cell, model.n_kept, N_CELL_MAX)
    assert info.n_window == len(model.window)
    assert runtime.n_past == model.n_past
    pos, tag = csp.cells()
    expected = np.array(model.rows).reshape(N_LAYER, N_HEAD_KV, model.n_cell, 2)
    assert np.array_equal(pos, expected[..., 0])
    assert np.array_equal(tag, expected[..., 1])
    if model.window:
        mass = csp.scores(N_WINDOW, 0.0).sum(axis=(2, 3))
        np.testing.assert_allclose(mass, len(model.window), rtol=1e-5)  # every query gives away a mass of 1
