"""An independent forward pass of llama, qwen2 and qwen2vl models in numpy, with per-head masks and n-softmax.

It reads the GGUF that llama.cpp reads and shares no code with it. Shapes are numpy order, last index fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Forward:
    """What one pass computed; n_key counts the cells of the past and the tokens of the pass."""

    logits: Array  # [n_token, n_vocab]
    q: Array  # [n_layer, n_head, n_token, head_dim], after RoPE, before scaling and rounding
    k: Array  # [n_layer, n_head_kv, n_key, head_dim], after RoPE, as the cache holds it
    v: Array  # [n_layer, n_head_kv, n_key, head_dim], as the cache holds it
    attention: Array  # [n_layer, n_head, n_token, n_key], rows of the softmax


class NumpyLlama:
    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.arch = str(reader.fields["general.architecture"].contents())
        if self.arch not in ("llama", "qwen2", "qwen2vl"):
            raise ValueError(f"{path}: no forward pass for the architecture {self.arch}")

        def setting(key: str, default: Any = None) -> Any:
            field = reader.fields.get(f"{self.arch}.{key}")
            return default if field is None else field.contents()

        self.n_layer = int(setting("block_count"))
        self.n_embd = int(setting("embedding_length"))
        self.n_head = int(setting("attention.head_count"))
        self.n_head_kv = int(setting("attention.head_count_kv", self.n_head))
        self.head_dim = int(setting("attention.key_length", self.n_embd // self.n_head))
        # llama.cpp in llama-cpp-python 0.3.36 does not read the epsilon of qwen2vl and computes with 0
        self.rms_eps = 0.0 if self.arch == "qwen2vl" else float(setting("attention.layer_norm_rms_epsilon"))
        self.rope_base = float(setting("rope.freq_base", 10000.0))
        self.rope_sections = [int(n) for n in setting("rope.dimension_sections", [])]
        self.half_precision = {t.name for t in reader.tensors if t.tensor_type == gguf.GGMLQuantizationType.F16}
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            self.half_precision = set()  # those kernels do not round activations
        self.weights: dict[str, Array] = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors
        }

    def forward(
        self,
        tokens: npt.ArrayLike | None = None,
        *,
        embd: Array | None = None,
        positions: npt.ArrayLike | None = None,
        mask: BoolArray | None = None,
        softmax_n: npt.ArrayLike = 0.0,
        f16_cache: bool = False,
        q8_cache: bool = False,
        past: tuple[Array, Array] | None = None,
    ) -> Forward:
        """One pass over tokens [n_token] or embeddings [n_token, n_embd], a whole sequence or what follows `past`.

        positions: [n_token], or [4, n_token] for M-RoPE (time, y, x, unused); default 0, 1, 2 …
        mask:      bool [n_layer, n_head_kv, n_token, n_key], what a query may see beside the causal mask
        softmax_n: scalar or [n_layer, n_head]
        f16_cache: round K and V, and what is multiplied with them, to f16
        q8_cache:  round K and V, and the queries, to q8_0
        past:      K and V [n_layer, n_head_kv, n_cell, head_dim] of cells that all tokens see
        """
        x = self.embed(tokens) if embd is None else np.asarray(embd, np.float32)
        n_token = len(x)
        position = np.asarray(np.arange(n_token) if positions is None else positions)
        n_past = 0 if past is None else past[0].shape[2]
        causal = np.pad(causal_mask(position), [(0, 0), (n_past, 0)], constant_values=True)
        sink = np.broadcast_to(np.asarray(softmax_n, np.float32), (self.n_layer, self.n_head))
        angle = self._angles(position)
        layers: list[tuple[Array, Array, Array, Array]] = []
        for il in range(self.n_layer):
            seen = causal if mask is None else causal & np.repeat(mask[il], self.n_head // self.n_head_kv, axis=0)
            h = self._norm(x, f"blk.{il}.attn_norm")
            q = self._rope(self._heads(h, f"blk.{il}.attn_q"), angle)
            k = self._rope(self._heads(h, f"blk.{il}.attn_k"), angle)
            v = self._heads(h, f"blk.{il}.attn_v")
            if f16_cache:
                k, v = round_f16(k), round_f16(v)
            if q8_cache:
                k, v = round_q8_0(k), round_q8_0(v)
            if past is not None:
                k, v = np.concatenate([past[0][il], k], axis=1), np.concatenate([past[1][il], v], axis=1)
            out, rows = attend(round_q8_0(q) if q8_cache else q, k, v, seen, sink[il], f16_cache)
            layers.append((q, k, v, rows))
            x = x + self._linear(out.transpose(1, 0, 2).reshape(n_token, -1), f"blk.{il}.attn_output")
            h = self._norm(x, f"blk.{il}.ffn_norm")
            gate = self._linear(h, f"blk.{il}.ffn_gate")
            h = gate / (1 + np.exp(-gate)) * self._linear(h, f"blk.{il}.ffn_up")
            x = x + self._linear(h, f"blk.{il}.ffn_down")
        output = "output" if "output.weight" in self.weights else "token_embd"
        logits = self._linear(self._norm(x, "output_norm"), output)
        q, k, v, rows = (np.stack(arrays) for arrays in zip(*layers, strict=True))
        return Forward(logits, q, k, v, rows)

    def embed(self, tokens: npt.ArrayLike | None) -> Array:
        """Token embeddings [n_token, n_embd]; concatenate with image embeddings to run a mixed sequence."""
        return self.weights["token_embd.weight"][np.asarray(tokens)]

    def _linear(self, x: Array, name: str) -> Array:
        # llama.cpp multiplies f16 matrices with rounded activations
        y = (round_f16(x) if f"{name}.weight" in self.half_precision else x) @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def _heads(self, x: Array, name: str) -> Array:
        return self._linear(x, name).reshape(len(x), -1, self.head_dim).transpose(1, 0, 2)

    def _norm(self, x: Array, name: str) -> Array:
        mean = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
        return (x / np.sqrt(mean + self.rms_eps)).astype(np.float32) * self.weights[f"{name}.weight"]

    def _angles(self, position: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """[n_token, head_dim/2]"""
        pair = np.arange(self.head_dim // 2)
        frequency = self.rope_base ** (-2.0 * pair / self.head_dim)
        if not self.rope_sections:
            return position[:, None] * frequency
        if position.ndim == 1:
            position = np.stack([position, position, position, 0 * position])
        axis = np.repeat(np.arange(4), self.rope_sections)[pair % sum(self.rope_sections)]
        return position[axis].T * frequency

    def _rope(self, x: Array, angle: npt.NDArray[np.float64]) -> Array:
        """Rotate pairs of neighbours (llama) or of the two halves (qwen2); x [n_head, n_token, head_dim]."""
        half = self.head_dim // 2
        first, second = (
            (slice(0, None, 2), slice(1, None, 2)) if self.arch == "llama" else (slice(0, half), slice(half, None))
        )
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        out = np.empty_like(x)
        out[..., first] = x[..., first] * cos - x[..., second] * sin
        out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out


def causal_mask(position: npt.NDArray[Any]) -> BoolArray:
    """Keys that a query sees, bool [n_query, n_key]. With M-RoPE the cells of an image share a time: raster order."""
    if position.ndim == 1:
        return position[None, :] <= position[:, None]
    time, y, x = position[:3]
    order = np.stack([time, y, x], axis=-1).tolist()
    return np.array([[key <= query for key in order] for query in order])


def attend(
    q: Array, k: Array, v: Array, seen: BoolArray, softmax_n: Array, f16_cache: bool = False
) -> tuple[Array, Array]:
    """Attention of one layer: output [n_head, n_query, head_dim] and the rows of the softmax [n_head, n_query, n_key].

    q [n_head, n_query, head_dim]; k, v [n_head_kv, n_key, head_dim]; seen broadcasts to the rows; softmax_n [n_head]
    """
    group = len(q) // len(k)
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    x = (round_f16(q) if f16_cache else q) @ k.transpose(0, 2, 1) / np.float32(np.sqrt(q.shape[-1]))
    rows = softmax(x, seen, softmax_n[:, None, None])
    return (round_f16(rows) if f16_cache else rows) @ v, rows


def softmax(x: Array, seen: BoolArray, n: npt.ArrayLike) -> Array:
    """exp(x) / (n + sum exp(x)) over the last axis, in f64; unseen entries are 0, as is a row that sees none."""
    x64 = np.where(seen, x.astype(np.float64), -np.inf)
    top = np.maximum(x64.max(axis=-1, keepdims=True), -700.0)
    weight = np.exp(x64 - top)
    total = np.asarray(n, np.float64) * np.exp(-top) + weight.sum(axis=-1, keepdims=True)
    return np.divide(weight, total, out=np.zeros_like(weight), where=total > 0).astype(np.float32)


def window_scores(
    q: Array,
    k: Array,
    modality: npt.ArrayLike,
    n_obs: int,
    softmax_n: float,
    seen: BoolArray | None = None,
    *,
    n_modality: int,
) -> Array:
    """Attention mass of the last n_obs queries, as llama_csp_scores() defines it.

    q:        [n_layer, n_head, n_query, head_dim]
    k:        [n_layer, n_head_kv, n_cell, head_dim]
    modality: [n_query], of the queries
    seen:     bool, broadcasts to [n_layer, n_head_kv, n_query, n_cell]: the cells that a query saw. Default:
              causal, the queries being those of the last n_query cells
    Returns f32 [n_layer, n_head_kv, n_modality, n_cell]: the mean over the heads of a KV head, summed over the queries
    of one modality.
    """
    n_layer, n_head, n_query, head_dim = q.shape
    _, n_head_kv, n_cell, _ = k.shape
    if seen is None:
        seen = np.arange(n_cell)[None, :] <= np.arange(n_cell - n_query, n_cell)[:, None]
    seen = np.broadcast_to(seen, (n_layer, n_head_kv, n_query, n_cell))
    window = slice(max(0, n_query - n_obs), None)
    voter = np.asarray(modality)[window]
    scores = np.zeros((n_layer, n_head_kv, n_modality, n_cell), np.float32)
    for il in range(n_layer):
        grouped = q[il, :, window].reshape(n_head_kv, n_head // n_head_kv, -1, head_dim)
        x = grouped @ k[il, :, None].transpose(0, 1, 3, 2) / np.float32(np.sqrt(head_dim))
        mass = softmax(x, seen[il, :, None, window], softmax_n).mean(axis=1, dtype=np.float64)
        for m in range(n_modality):
            scores[il, :, m] = mass[:, voter == m].sum(axis=1)
    return scores


def round_f16(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def round_q8_0(x: Array) -> Array:
    kind = gguf.GGMLQuantizationType.Q8_0
    rounded: Array = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(x), kind), kind)
    return rounded
