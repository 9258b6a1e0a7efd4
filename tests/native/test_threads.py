"""The number of threads changes no byte of what is kept and selected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_csp.native import Csp
from tests.native.cache import read_rows
from tests.native.test_keep import random_cells
from tests.oracle.numpy_llama import NumpyLlama
from tests.oracle.runtime import Runtime


@pytest.mark.parametrize("flash", [False, True])
def test_threads(model: Path, flash: bool) -> None:
    oracle = NumpyLlama(model)
    results = []
    for n_threads in (1, 2, 5):
        with Runtime(model, type_k="f16", type_v="f16", flash_attn=flash, n_threads=n_threads) as runtime:
            csp = Csp.attach(runtime.ctx)
            runtime.decode(np.arange(60))
            scores = csp.scores(32)
            chosen = csp.select(scores, k_self=10, k_cross=10, n_recent=4)
            csp.keep(random_cells(csp, 30, seed=1))
            rows = read_rows(runtime, oracle.n_layer, oracle.n_head_kv, 30)
            results.append([array.tobytes() for array in (scores, chosen, rows.k, rows.v, *csp.cells())])
            csp.close()
    assert results[0] == results[1] == results[2]
