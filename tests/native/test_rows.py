"""Rows of the cache as floats, against the state of llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants

from edge_csp.errors import NativeError
from edge_csp.native import Csp
from tests.native.cache import read_rows
from tests.native.conftest import Open
from tests.native.test_keep import random_cells
from tests.oracle.numpy_llama import NumpyLlama
from tests.oracle.runtime import Runtime

N_CELL = 40


def values_of(rows: npt.NDArray[Any], cache: str) -> npt.NDArray[np.float32]:
    """Bytes of rows as floats, by the gguf package."""
    values: npt.NDArray[np.float32] = quants.dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[cache.upper()])
    return values.astype(np.float32)


def open_pruned(device: Open, path: Path, cache: str, flash_attn: bool) -> tuple[Runtime, Csp]:
    runtime = device(path, type_k=cache, type_v=cache, flash_attn=flash_attn)
    csp = Csp.attach(runtime.ctx)
    runtime.decode(np.random.default_rng(1).integers(0, 96, 60))
    csp.keep(random_cells(csp, N_CELL - 5, seed=1))
    runtime.decode(np.arange(5))
    return runtime, csp


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("cache", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_rows(gqa: Path, device: Open, cache: str, flash_attn: bool) -> None:
    if cache.startswith("q") and not flash_attn:
        pytest.skip("llama.cpp quantises V only with flash attention")
    runtime, csp = open_pruned(device, gqa, cache, flash_attn)
    with runtime:
        oracle = NumpyLlama(gqa)
        shape = oracle.n_layer, oracle.n_head_kv, N_CELL
        stored = read_rows(runtime, *shape)
        k, v = values_of(stored.k, cache), values_of(stored.v, cache)
        for layer in range(oracle.n_layer):
            assert np.array_equal(csp.rows(layer, "k", oracle.head_dim), k[layer])
            assert np.array_equal(csp.rows(layer, "v", oracle.head_dim), v[layer])
        for kind, rows in (("k", k), ("v", v)):
            norms = csp.norms(kind)
            assert norms.shape == shape
            assert np.allclose(norms, np.linalg.norm(rows.astype(np.float64), axis=-1), rtol=1e-5, atol=0)
            assert np.array_equal(csp.norms(kind, layers=range(1, 3)), norms[1:3])

        # what is written is read again, rounded, and nothing else changes; none of it is within 1/1000 of a step of the
        # middle between two steps, where a fused multiply-add could decide
        generator = np.random.default_rng(2)
        for kind, before in (("k", k), ("v", v)):
            rows = before[1].copy()
            rows[0, 3:9] = generator.normal(0, 2, (6, oracle.head_dim))
            csp.set_rows(1, kind, rows)
            rounded = values_of(quants.quantize(rows, GGMLQuantizationType[cache.upper()]), cache)
            assert np.array_equal(csp.rows(1, kind, oracle.head_dim), rounded)
            assert np.array_equal(rounded[1], before[1, 1])
        after = read_rows(runtime, *shape)
        assert np.array_equal(after.k[[0, 2]], stored.k[[0, 2]])
        assert np.array_equal(after.v[[0, 2]], stored.v[[0, 2]])
        assert not np.array_equal(after.k[1], stored.k[1])
        csp.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda csp: csp.norms("v", layers=range(2, 4)), "the cache has the layers"),
        (lambda csp: csp.rows(3, "k", 32), "the cache has the layers"),
        (lambda csp: csp.rows(0, "k", 31), "n_value is 2480, needed are 2560"),
        (lambda csp: csp.set_rows(0, "v", np.zeros((2, 40, 31), np.float32)), "n_value is 2480, needed are 2560"),
        (lambda csp: csp.set_rows(0, "v", np.full((2, 40, 32), np.nan, np.float32)), "not finite"),
        (lambda csp: csp.norms("k", seq_id=1), "seq_id is 1"),
    ],
)
def test_refusals(gqa: Path, call: Any, message: str) -> None:
    runtime, csp = open_pruned(Runtime, gqa, "f16", False)
    with runtime:
        before = csp.rows(0, "v", 32)
        with pytest.raises(NativeError, match=message):
            call(csp)
        assert np.array_equal(csp.rows(0, "v", 32), before)
        csp.close()
