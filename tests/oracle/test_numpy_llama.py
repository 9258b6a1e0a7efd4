"""The numpy forward pass is what llama.cpp computes, so that it may judge what our fork computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from .numpy_llama import NumpyLlama, attend, window_scores
from .random_models import make_model
from .runtime import Runtime, relative_error

TOLERANCE = {"f32": 5e-5, "f16": 2e-3}
TOLERANCE_FLASH = 5e-3  # llama.cpp's CPU kernel casts f32 caches to f16 and sums the values in f16
MODELS: dict[str, dict[str, Any]] = {
    "llama-mha": {"arch": "llama", "n_head_kv": 4},
    "llama-gqa": {"arch": "llama"},
    "llama-tied": {"arch": "llama", "tied": True},
    "llama-f16": {"arch": "llama", "dtype": "f16"},
    "qwen2": {"arch": "qwen2"},
    "qwen2vl": {"arch": "qwen2vl"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", **MODELS[request.param])


def tolerance_of(model: Path, cache: str) -> float:
    """f16 weights round the activations; one that falls the other way is as large as a rounding in the cache."""
    return TOLERANCE["f16" if "f16" in model.stem else cache]


def decode_in_parts(runtime: Runtime, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """A prompt in ubatches, then ten single tokens."""
    n = len(tokens) - 10
    return np.concatenate([runtime.decode(part) for part in (tokens[:n], *tokens[n:, None])])


@pytest.mark.parametrize("cache", TOLERANCE)
def test_tokens(model: Path, cache: str) -> None:
    tokens = np.random.default_rng(1).integers(0, 96, 100)
    expected = NumpyLlama(model).forward(tokens, f16_cache=cache == "f16").logits
    with Runtime(model, type_k=cache, type_v=cache) as runtime:
        assert relative_error(decode_in_parts(runtime, tokens), expected) <= tolerance_of(model, cache)


def test_flash_attention(model: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 96, 100)
    expected = NumpyLlama(model).forward(tokens, f16_cache=True).logits
    with Runtime(model, type_k="f16", type_v="f16", flash_attn=True) as runtime:
        assert relative_error(decode_in_parts(runtime, tokens), expected) <= TOLERANCE_FLASH


@pytest.mark.parametrize("cache", TOLERANCE)
def test_embeddings_between_tokens(model: Path, cache: str) -> None:
    """Text, a picture of 4 x 5 embeddings, text; with M-RoPE the picture takes a grid of positions."""
    generator = np.random.default_rng(2)
    oracle = NumpyLlama(model)
    before, after = generator.integers(0, 96, 12), generator.integers(0, 96, 30)
    picture = generator.standard_normal((20, oracle.n_embd), np.float32)
    embd = np.concatenate([oracle.embed(before), picture, oracle.embed(after)])
    with Runtime(model, type_k=cache, type_v=cache) as runtime:
        logits = [runtime.decode(before)]
        if oracle.rope_sections:
            y, x = np.divmod(np.arange(20), 5)
            grid = np.stack([np.full(20, 12), 12 + y, 12 + x, 0 * x])
            logits.append(runtime.decode(embd=picture, positions=grid))
            runtime.n_past = 12 + 5
            text = np.concatenate([np.arange(12), np.arange(17, 47)])
            flat = np.stack([text, text, text, 0 * text])
            positions = np.concatenate([flat[:, :12], grid, flat[:, 12:]], axis=1)
        else:
            logits.append(runtime.decode(embd=picture))
            positions = np.arange(62)
        logits.append(runtime.decode(after))
    expected = oracle.forward(embd=embd, positions=positions, f16_cache=cache == "f16").logits
    assert relative_error(np.concatenate(logits), expected) <= tolerance_of(model, cache)


def test_removed_cells_are_masked_keys(model: Path) -> None:
    """Cells 5 .. 24 leave the cache of llama.cpp before token 40: later queries do not see them."""
    tokens = np.random.default_rng(6).integers(0, 96, 60)
    oracle = NumpyLlama(model)
    mask = np.ones((oracle.n_layer, oracle.n_head_kv, 60, 60), np.bool_)
    mask[:, :, 40:, 5:25] = False
    expected = oracle.forward(tokens, mask=mask).logits
    with Runtime(model) as runtime:
        before = runtime.decode(tokens[:40])
        runtime.remove(5, 25)
        logits = np.concatenate([before, runtime.decode(tokens[40:])])
    assert relative_error(logits, expected) <= tolerance_of(model, "f32")
    assert relative_error(oracle.forward(tokens).logits, expected) > 0.01


def test_mask_hides_keys(model: Path) -> None:
    """A key that no query may see has no influence; a mask of one head changes that head only."""
    tokens = np.random.default_rng(3).integers(0, 96, 40)
    oracle = NumpyLlama(model)
    mask = np.ones((oracle.n_layer, oracle.n_head_kv, 40, 40), np.bool_)
    plain = oracle.forward(tokens)
    assert np.array_equal(oracle.forward(tokens, mask=mask).logits, plain.logits)
    mask[0, 0, 30:, :20] = False
    masked = oracle.forward(tokens, mask=mask)
    group = oracle.n_head // oracle.n_head_kv
    assert np.array_equal(masked.logits[:30], plain.logits[:30])
    assert not masked.attention[0, :group, 30:, :20].any()
    assert np.array_equal(masked.attention[0, group:], plain.attention[0, group:])


def test_attention_rows(model: Path) -> None:
    """Rows sum to 1, or with n to sum/(n + sum): n counts as a key with logit ln n and the value 0."""
    tokens = np.random.default_rng(4).integers(0, 96, 30)
    oracle = NumpyLlama(model)
    plain = oracle.forward(tokens)
    np.testing.assert_allclose(plain.attention.sum(axis=-1), 1, atol=1e-6)
    n = np.linspace(0.5, 3, oracle.n_layer * oracle.n_head).reshape(oracle.n_layer, oracle.n_head)
    with_sink = oracle.forward(tokens, softmax_n=n)
    q, k, v = with_sink.q[0], with_sink.k[0], with_sink.v[0]
    seen = np.tril(np.ones((30, 30), np.bool_))
    for head in range(oracle.n_head):
        kv = head // (oracle.n_head // oracle.n_head_kv)
        x = (q[head] @ k[kv].T / np.sqrt(oracle.head_dim)).astype(np.float64)
        weight = np.where(seen, np.exp(x), 0)
        np.testing.assert_allclose(
            with_sink.attention[0, head], weight / (n[0, head] + weight.sum(axis=-1, keepdims=True)), atol=1e-6
        )
    out, rows = attend(q, k, v, seen, n[0].astype(np.float32))
    np.testing.assert_allclose(rows, with_sink.attention[0], atol=1e-6)  # q and k are laid out otherwise in memory
    assert out.shape == (oracle.n_head, 30, oracle.head_dim)


def test_window_scores(model: Path) -> None:
    """Scores of the whole sequence are the attention rows, split by the modality of the query."""
    generator = np.random.default_rng(5)
    tokens, modality = generator.integers(0, 96, 50), generator.integers(0, 3, 50)
    oracle = NumpyLlama(model)
    result = oracle.forward(tokens, softmax_n=1.0)
    scores = window_scores(result.q, result.k, modality, 16, 1.0, n_modality=3)
    rows = result.attention.reshape(oracle.n_layer, oracle.n_head_kv, -1, 50, 50).mean(axis=2)[:, :, 34:]
    for m in range(3):
        np.testing.assert_allclose(scores[:, :, m], rows[:, :, modality[34:] == m].sum(axis=2), atol=1e-6)


@pytest.mark.parametrize("arch", ["gemma3", "mamba", "deepseek2"])
def test_other_architectures_load(arch: str, tmp_path: Path) -> None:
    """Models that only serve to be refused: they must run in llama.cpp."""
    with Runtime(make_model(tmp_path / "model.gguf", arch, n_layer=6), flash_attn=False) as runtime:
        assert np.isfinite(runtime.decode(np.arange(40))).all()
