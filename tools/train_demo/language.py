"""The language model, as llama.cpp's ``llama``, ``qwen3`` and ``qwen2vl`` architectures compute it.

RMS norm, RoPE, grouped queries, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shape import TextShape

# (layer index, q (b, n_head, t, head_dim), k, v (b, n_head, t, head_dim)) -> (b, n_head, t, head_dim)
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_table(pos: Tensor, shape: TextShape) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions (b, t, 3) of time, row and column, each (b, 1, t, head_dim / 2)."""
    freq = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    section = torch.repeat_interleave(torch.arange(3), torch.tensor(shape.rope_sections))
    angle = pos[..., section].float()[:, None] * freq
    return angle.cos(), angle.sin()


def rope(x: Tensor, table: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate x (b, h, t, head_dim) in pairs (2i, 2i + 1) if interleaved, else (i, i + head_dim / 2)."""
    cos, sin = table
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape = shape
        n_embd, n_kv, bias = shape.n_embd, shape.n_head_kv * shape.head_dim, shape.qkv_bias
        self.attn_norm = RMSNorm(n_embd, shape.rms_eps)
        self.attn_q = nn.Linear(n_embd, shape.n_head * shape.head_dim, bias=bias)
        self.attn_k = nn.Linear(n_embd, n_kv, bias=bias)
        self.attn_v = nn.Linear(n_embd, n_kv, bias=bias)
        if shape.qk_norm:
            self.attn_q_norm = RMSNorm(shape.head_dim, shape.rms_eps)
            self.attn_k_norm = RMSNorm(shape.head_dim, shape.rms_eps)
            nn.init.constant_(self.attn_q_norm.weight, 2.0)  # else no head can look at one token among hundreds
        self.attn_output = nn.Linear(shape.n_head * shape.head_dim, n_embd, bias=False)
        self.ffn_norm = RMSNorm(n_embd, shape.rms_eps)
        self.ffn_gate = nn.Linear(n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, n_embd, bias=False)

    def forward(self, il: int, x: Tensor, table: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        b, t, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            f(h).view(b, t, -1, self.shape.head_dim).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v)
        )
        if self.shape.qk_norm:
            q, k = self.attn_q_norm(q.float()), self.attn_k_norm(k.float())
        groups, interleaved = self.shape.n_head // self.shape.n_head_kv, self.shape.interleaved
        q, k = rope(q, table, interleaved).to(v.dtype), rope(k, table, interleaved).to(v.dtype)
        h = attention(il, q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        x = x + self.attn_output(h.transpose(1, 2).reshape(b, t, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class LanguageModel(nn.Module):
    def __init__(self, shape: TextShape, n_vocab: int) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(n_vocab, shape.n_embd)
        # Much larger than the output matrix, so not tied: a small embedding drowns in what the first block adds to it,
        # and then no later block can copy a word.
        nn.init.normal_(self.token_embd.weight, std=4.0)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = RMSNorm(shape.n_embd, shape.rms_eps)
        self.output = nn.Linear(shape.n_embd, n_vocab, bias=False)
        nn.init.normal_(self.output.weight, std=0.06)
        for block in self.blk:
            nn.init.zeros_(block.attn_output.weight)
            nn.init.zeros_(block.ffn_down.weight)

    def forward(self, x: Tensor, pos: Tensor, attention: Attention = causal_attention) -> tuple[list[Tensor], Tensor]:
        """Embeddings (b, t, n_embd) at positions (b, t, 3) to the states after each block and after the last norm."""
        table = rope_table(pos, self.shape)
        states = []
        for il, block in enumerate(self.blk):
            x = block(il, x, table, attention)
            states.append(x)
        return states, self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)
