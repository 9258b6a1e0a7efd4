"""scores: against numpy on the queries and keys that llama.cpp really used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_csp.errors import NativeError
from edge_csp.native import Csp
from tests.native.cache import GraphTap, read_rows
from tests.native.conftest import Open
from tests.native.test_keep import random_cells
from tests.oracle.numpy_llama import NumpyLlama, window_scores
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime, relative_error

DTYPE = {"f32": np.float32, "f16": np.float16}


@pytest.mark.parametrize("n", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("n_obs", [1, 12, 32])
@pytest.mark.parametrize("cache", ["f32", "f16"])
def test_scores(model: Path, device: Open, cache: str, n_obs: int, n: float) -> None:
    oracle = NumpyLlama(model)
    tokens = np.random.default_rng(1).integers(0, 96, 70)
    tap = GraphTap()
    with device(model, type_k=cache, type_v=cache, n_ubatch=128, context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(tokens)
        q = tap.queries(oracle.n_layer, oracle.n_head, oracle.head_dim)
        rows = read_rows(runtime, oracle.n_layer, oracle.n_head_kv, 70)
        scores = csp.scores(n_obs, n)
        csp.close()
    k = np.ascontiguousarray(rows.k).view(DTYPE[cache]).astype(np.float32)
    q = q.astype(DTYPE[cache]).astype(np.float32)  # ggml multiplies an f16 matrix with rounded rows
    expected = window_scores(q, k, np.zeros(70, np.int64), n_obs, n, n_modality=3)
    assert relative_error(scores, expected) <= 2e-6  # f32 rounds a logit of 8 by 5e-7


def test_scores_by_modality(model: Path, device: Open) -> None:
    """The votes of text, image and audio queries are kept apart; the window spans ubatches."""
    oracle = NumpyLlama(model)
    tokens = np.random.default_rng(2).integers(0, 96, 60)
    modality = np.repeat([0, 1, 2, 0], [40, 8, 7, 5])
    with device(model, n_ubatch=16) as runtime:
        csp = Csp.attach(runtime.ctx)
        for m in (0, 1, 2, 0):
            csp.set_modality(m)
            begin = runtime.n_past
            end = begin + np.argmax(np.append(modality[begin:] != m, True))
            runtime.decode(tokens[begin:end])
        scores = csp.scores(32, 1.0)
        csp.close()
    forward = oracle.forward(tokens)
    expected = window_scores(forward.q, forward.k, modality, 32, 1.0, n_modality=3)
    assert relative_error(scores, expected) <= 1e-5  # numpy's own queries: f32 rounding of a whole forward pass
    assert scores[:, :, 1:].any()
    assert not np.array_equal(scores[:, :, 0], scores[:, :, 1])


@pytest.mark.parametrize("head_dim", [32, 48, 128])
@pytest.mark.parametrize("cache", DTYPE)
def test_all_ways_to_score(tmp_path: Path, cache: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for host memory, the graph of other backends, and the graph of operations that all backends have."""
    model = make_model(tmp_path / "model.gguf", "llama", n_head=6, head_dim=head_dim)
    with Runtime(model, n_ctx=512, n_ubatch=512, type_k=cache, type_v=cache) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=50)  # with three heads in a group: five blocks of queries
        csp.set_modality(1)
        runtime.decode(np.arange(300) % 96)
        csp.set_modality(0)
        runtime.decode(np.arange(20))
        scores = csp.scores(40, 0.5)
        for way in ("graph", "graph-portable"):
            monkeypatch.setenv("LLAMA_CSP_SCORES", way)
            assert relative_error(csp.scores(40, 0.5), scores) <= 2e-6
        csp.close()


def test_window_forgets_removed_tokens(gqa: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 96, 60)
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx, n_window=16)
        runtime.decode(tokens[:50])
        expected = csp.scores(16)
        runtime.decode(tokens[50:])
        assert runtime.remove(50, 60)
        assert csp.info().n_window == 6  # of the 16 last queries 10 are gone
        assert runtime.remove(44, 50)
        with pytest.raises(NativeError, match="window is empty"):
            csp.scores(16)
        runtime.n_past = 44
        runtime.decode(tokens[44:50])
        assert csp.info().n_window == 6
        mass = csp.scores(16).sum(axis=(2, 3))
        assert (mass < 6).all()
        assert (expected.sum(axis=(2, 3)) > mass).all()
        csp.close()


def test_scores_after_keep_use_the_new_window(gqa: Path) -> None:
    with Runtime(gqa) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(np.arange(60))
        info = csp.info()
        csp.keep(np.broadcast_to(np.arange(20, 60, dtype=np.int32), (info.n_layer, info.n_head_kv, 40)))
        with pytest.raises(NativeError, match="window is empty"):
            csp.scores(32)
        runtime.decode(np.arange(5))
        scores = csp.scores(32, 0.0)
        assert csp.info().n_window == 5
        np.testing.assert_allclose(scores.sum(axis=(2, 3)), 5, rtol=1e-5)  # five rows that each sum to 1
        csp.close()


def test_layers(model: Path, device: Open) -> None:
    """Scores and cells of some layers are those of all."""
    with device(model) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(np.random.default_rng(3).integers(0, 96, 50))
        csp.keep(random_cells(csp, 40, seed=1))
        runtime.decode(np.arange(8))
        whole = csp.scores(8), *csp.cells()
        for layers in (range(1), range(1, 3), range(2, 3)):
            some = csp.scores(8, layers=layers), *csp.cells(layers=layers)
            for part, all_layers in zip(some, whole, strict=True):
                assert np.array_equal(part, all_layers[layers.start : layers.stop])
        for wrong in (range(-1, 1), range(2, 4), range(3, 4)):
            with pytest.raises(NativeError, match=r"the cache has the layers 0 \.\. 2"):
                csp.scores(8, layers=wrong)
            with pytest.raises(NativeError, match=r"the cache has the layers 0 \.\. 2"):
                csp.cells(layers=wrong)
        csp.close()
