"""Made-up states of a sequence against the library's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_csp.bench.fill import BLOCK, random_state
from tests.native.cache import read_rows, restore_sequence, sequence_state
from tests.native.conftest import MODELS
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime

N_LAYER, HEAD_DIM = 3, 32
CACHES = [
    ("f16", "f16", False),
    ("f16", "f16", True),
    ("q8_0", "f16", False),
    ("q8_0", "q8_0", True),
    ("f32", "f32", False),
]


@pytest.mark.parametrize(("type_k", "type_v", "flash"), CACHES)
@pytest.mark.parametrize("name", MODELS)
def test_state_is_the_librarys(tmp_path: Path, name: str, type_k: str, type_v: str, flash: bool) -> None:
    """A made-up state has the size of a decoded one, is taken, and comes back byte for byte; decoding goes on."""
    path = make_model(tmp_path / "model.gguf", **MODELS[name])
    with Runtime(path, type_k=type_k, type_v=type_v, flash_attn=flash) as runtime:
        tokens = np.arange(41)
        runtime.decode(tokens[:1])
        one_cell = sequence_state(runtime)
        runtime.decode(tokens[1:])
        decoded = sequence_state(runtime)
        made = random_state(one_cell, 41)
        assert made.size == decoded.size
        runtime.clear()
        restore_sequence(runtime, made)
        assert sequence_state(runtime).tobytes() == made.tobytes()
        runtime.n_past = 41
        assert np.isfinite(runtime.decode([1, 2, 3])).all()


@pytest.mark.parametrize(("dtype", "type_name", "low", "high"), [("f2", "f16", 0.06, 0.26), ("f4", "f32", 0.03, 0.51)])
def test_rows_are_good_numbers(tmp_path: Path, dtype: str, type_name: str, low: float, high: float) -> None:
    path = make_model(tmp_path / "model.gguf", arch="llama")
    with Runtime(path, type_k=type_name, type_v=type_name) as runtime:
        runtime.decode([1])
        restore_sequence(runtime, random_state(sequence_state(runtime), 200))
        rows = read_rows(runtime, N_LAYER, 2, 200)
    for values in (rows.k.view(dtype), rows.v.view(dtype)):
        sizes = np.abs(values)
        assert low < sizes.min() < sizes.max() < high
        assert abs(np.sign(values).mean()) < 0.1
        assert len(np.unique(values)) > 1000 or dtype == "f2"


def test_rows_repeat_beyond_a_block(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model.gguf", arch="llama", n_head_kv=4)
    with Runtime(path) as runtime:
        runtime.decode([1])
        one_cell = sequence_state(runtime)
    made = random_state(one_cell, 3000)
    assert made.size > 2 * BLOCK
    head = one_cell.tobytes()[:8]
    assert made[:8].tobytes() == head
    made[-4:] = 0  # it can be written to, also in the last block
    assert made[BLOCK - 4 : BLOCK].tobytes() != bytes(4)


def test_other_caches_are_refused(tmp_path: Path) -> None:
    """A recurrent memory has no rows of K and V."""
    path = make_model(tmp_path / "mamba.gguf", arch="mamba")
    with Runtime(path) as runtime:
        runtime.decode([1])
        with pytest.raises(ValueError, match="KV cache"):
            random_state(sequence_state(runtime), 10)
