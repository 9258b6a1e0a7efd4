"""n-softmax in attention: p = exp(x) / (n + sum exp(x)), against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_csp.native import Csp
from tests.native.cache import GraphTap, read_rows
from tests.native.conftest import Open
from tests.oracle.numpy_llama import NumpyLlama, attend, causal_mask
from tests.oracle.runtime import Runtime, relative_error

TOLERANCE_ROW = 3e-6  # a softmax of f32 logits: ln n of 1e4 is rounded by up to 5e-7, and so are differences from it
TOLERANCE_FORWARD = 5e-6  # f32 rounding of a whole forward pass
TOLERANCE_FLASH = 5e-3  # llama.cpp's CPU kernel casts f32 caches to f16 and sums the values in f16
TOKENS = np.random.default_rng(1).integers(0, 96, 50)


def values_of(kind: str, oracle: NumpyLlama) -> npt.NDArray[np.float32]:
    """[] or [n_layer, n_head]"""
    if kind != "per head":
        return np.float32(kind)
    n = np.random.default_rng(2).uniform(0, 8, (oracle.n_layer, oracle.n_head)).astype(np.float32)
    n[0, 1] = n[-1, 0] = 0
    n[1, 2] = 1000
    return n


@pytest.mark.parametrize("kind", ["0", "1e-3", "1", "1e4", "per head"])
def test_attention(model: Path, device: Open, kind: str) -> None:
    """The output of attention itself, from the queries, keys and values that llama.cpp used."""
    oracle = NumpyLlama(model)
    n = values_of(kind, oracle)
    tap = GraphTap("Qcur", "kqv_out")
    with device(model, context_params=tap.params) as runtime:
        csp = Csp.attach(runtime.ctx)
        csp.set_softmax_n(n)
        runtime.decode(TOKENS)
        q = tap.queries(oracle.n_layer, oracle.n_head, oracle.head_dim)
        out = tap.heads("kqv_out", oracle.n_layer, oracle.n_head, oracle.head_dim)
        rows = read_rows(runtime, oracle.n_layer, oracle.n_head_kv, len(TOKENS))
        csp.close()
    k, v = (np.ascontiguousarray(bytes_).view(np.float32) for bytes_ in (rows.k, rows.v))
    seen = causal_mask(np.arange(len(TOKENS)))
    per_head = np.broadcast_to(n, (oracle.n_layer, oracle.n_head))
    for il in range(oracle.n_layer):
        assert relative_error(out[il], attend(q[il], k[il], v[il], seen, per_head[il])[0]) <= TOLERANCE_ROW


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("kind", ["1", "50", "per head"])
def test_logits(model: Path, device: Open, kind: str, flash: bool) -> None:
    """A prompt in ubatches and single tokens; n set after attaching and changed before use."""
    oracle = NumpyLlama(model)
    n = values_of(kind, oracle)
    with device(model, flash_attn=flash, n_ubatch=16) as runtime:
        csp = Csp.attach(runtime.ctx)
        csp.set_softmax_n(3.0)
        csp.set_softmax_n(n)
        logits = np.concatenate([runtime.decode(part) for part in (TOKENS[:45], *TOKENS[45:, None])])
        csp.close()
    expected = oracle.forward(TOKENS, softmax_n=n, f16_cache=flash).logits
    assert relative_error(logits, expected) <= (TOLERANCE_FLASH if flash else TOLERANCE_FORWARD)
    assert relative_error(oracle.forward(TOKENS).logits, expected) > 10 * TOLERANCE_FLASH


@pytest.mark.parametrize("flash", [False, True])
def test_toggling(model: Path, device: Open, flash: bool) -> None:
    """N = 0 restores the ordinary softmax to the bit, and detaching does; setting n takes effect at the next decode."""
    parts = np.split(TOKENS, 5)
    with device(model, flash_attn=flash) as runtime:
        plain = [runtime.decode(part) for part in parts]
        runtime.clear()
        csp = Csp.attach(runtime.ctx)

        def last(*n: float) -> bytes:
            """The last part with n, all before it with the ordinary softmax."""
            runtime.remove(40, 50)
            runtime.n_past = 40
            for value in n:
                csp.set_softmax_n(value)
            return runtime.decode(parts[4]).tobytes()

        assert [runtime.decode(part).tobytes() for part in parts] == [logits.tobytes() for logits in plain]
        one = last(1.0)
        assert one != plain[4].tobytes()
        assert last(5.0) not in (one, plain[4].tobytes())
        assert last(1.0) == one
        assert last(0.0) == plain[4].tobytes()
        assert last(7.0, 0.0) == plain[4].tobytes()
        assert last(0.0, 1.0) == one
        csp.close()
        runtime.remove(40, 50)
        runtime.n_past = 40
        assert runtime.decode(parts[4]).tobytes() == plain[4].tobytes()


def test_heads_with_zero_are_ordinary(gqa: Path) -> None:
    """N in the last head of the last layer only: what comes before it keeps its bits."""
    oracle = NumpyLlama(gqa)
    n = np.zeros((oracle.n_layer, oracle.n_head), np.float32)
    n[-1, -1] = 2
    outputs = []
    for value in (np.zeros_like(n), n):
        tap = GraphTap("kqv_out")
        with Runtime(gqa, context_params=tap.params) as runtime:
            csp = Csp.attach(runtime.ctx)
            csp.set_softmax_n(value)
            runtime.decode(TOKENS)
            csp.close()
        outputs.append(tap.heads("kqv_out", oracle.n_layer, oracle.n_head, oracle.head_dim))
    zero, some = outputs
    assert np.array_equal(zero[:-1], some[:-1])
    np.testing.assert_allclose(zero[-1, :-1], some[-1, :-1], rtol=1e-6, atol=1e-6)
    assert not np.allclose(zero[-1, -1], some[-1, -1], atol=1e-2)


def test_after_keep(model: Path, device: Open) -> None:
    """N beside a pruned cache: n counts once for the row, whatever is gone."""
    oracle = NumpyLlama(model)
    n = values_of("per head", oracle)
    with device(model) as runtime:
        csp = Csp.attach(runtime.ctx)
        runtime.decode(TOKENS[:40])
        kept = np.broadcast_to(np.arange(20, 40, dtype=np.int32), (oracle.n_layer, oracle.n_head_kv, 20))
        csp.keep(kept)
        csp.set_softmax_n(n)
        logits = runtime.decode(TOKENS[40:])
        csp.close()
    plain = oracle.forward(TOKENS[:40])
    assert np.isfinite(logits).all()
    expected = forward_from(oracle, plain.k[:, :, 20:], plain.v[:, :, 20:], TOKENS[40:], 40, n)
    assert relative_error(logits, expected) <= TOLERANCE_FORWARD


def forward_from(
    oracle: NumpyLlama,
    k: npt.NDArray[np.float32],
    v: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int64],
    begin: int,
    n: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Logits of tokens from position `begin` on, over past keys and values [n_layer, n_head_kv, n_past, head_dim]."""
    n_past, n_token = k.shape[2], len(tokens)
    seen = np.concatenate([np.ones((n_token, n_past), np.bool_), np.tri(n_token, dtype=np.bool_)], axis=1)
    x = oracle.embed(tokens)
    angle = oracle._angles(np.arange(begin, begin + n_token))
    for il in range(oracle.n_layer):
        name = f"blk.{il}."
        h = oracle._norm(x, f"{name}attn_norm")
        q = oracle._rope(oracle._heads(h, f"{name}attn_q"), angle)
        new_k = oracle._rope(oracle._heads(h, f"{name}attn_k"), angle)
        keys = np.concatenate([k[il], new_k], axis=1)
        values = np.concatenate([v[il], oracle._heads(h, f"{name}attn_v")], axis=1)
        out, _ = attend(q, keys, values, seen, n[il])
        x = x + oracle._linear(out.transpose(1, 0, 2).reshape(n_token, -1), f"{name}attn_output")
        h = oracle._norm(x, f"{name}ffn_norm")
        gate = oracle._linear(h, f"{name}ffn_gate")
        h = gate / (1 + np.exp(-gate)) * oracle._linear(h, f"{name}ffn_up")
        x = x + oracle._linear(h, f"{name}ffn_down")
    return oracle._linear(oracle._norm(x, "output_norm"), "output")
