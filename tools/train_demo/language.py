"""The language model: llama.cpp's ``llama`` architecture.

RMS norm, RoPE over interleaved pairs, grouped queries, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_EMBD = 128
N_LAYER = 4
N_HEAD = 4
N_HEAD_KV = 2
HEAD_DIM = 32
N_FF = 256
RMS_EPS = 1e-5
ROPE_BASE = 1e6
CONTEXT = 4096

# (layer index, q (b, n_head, t, 32), k, v (b, n_head, t, 32)) -> (b, n_head, t, 32)
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N_EMBD))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (N_EMBD,), self.weight, RMS_EPS)


def rope_table(pos: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions (b, t), each (b, 1, t, 16)."""
    freq = ROPE_BASE ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    angle = pos[:, None, :, None].float() * freq
    return angle.cos(), angle.sin()


def rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (2i, 2i + 1) of x (b, h, t, 32)."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def causal_attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_norm = RMSNorm()
        self.attn_q = nn.Linear(N_EMBD, N_HEAD * HEAD_DIM, bias=False)
        self.attn_k = nn.Linear(N_EMBD, N_HEAD_KV * HEAD_DIM, bias=False)
        self.attn_v = nn.Linear(N_EMBD, N_HEAD_KV * HEAD_DIM, bias=False)
        self.attn_output = nn.Linear(N_HEAD * HEAD_DIM, N_EMBD, bias=False)
        self.ffn_norm = RMSNorm()
        self.ffn_gate = nn.Linear(N_EMBD, N_FF, bias=False)
        self.ffn_up = nn.Linear(N_EMBD, N_FF, bias=False)
        self.ffn_down = nn.Linear(N_FF, N_EMBD, bias=False)

    def forward(self, il: int, x: Tensor, table: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        b, t, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (f(h).view(b, t, -1, HEAD_DIM).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v))
        groups = N_HEAD // N_HEAD_KV
        q, k = rope(q, table).to(v.dtype), rope(k, table).to(v.dtype)
        h = attention(il, q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1))
        x = x + self.attn_output(h.transpose(1, 2).reshape(b, t, -1))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class LanguageModel(nn.Module):
    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(n_vocab, N_EMBD)
        # Much larger than the output matrix, so not tied: a small embedding drowns in what the first block adds to it,
        # and then no later block can copy a word.
        nn.init.normal_(self.token_embd.weight, std=4.0)
        self.blk = nn.ModuleList(Block() for _ in range(N_LAYER))
        self.output_norm = RMSNorm()
        self.output = nn.Linear(N_EMBD, n_vocab, bias=False)
        nn.init.normal_(self.output.weight, std=0.06)
        for block in self.blk:
            nn.init.zeros_(block.attn_output.weight)
            nn.init.zeros_(block.ffn_down.weight)

    def forward(self, x: Tensor, pos: Tensor, attention: Attention = causal_attention) -> tuple[list[Tensor], Tensor]:
        """Embeddings (b, t, 128) at positions (b, t) to the states after each block and after the last norm."""
        table = rope_table(pos)
        states = []
        for il, block in enumerate(self.blk):
            x = block(il, x, table, attention)
            states.append(x)
        return states, self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)
