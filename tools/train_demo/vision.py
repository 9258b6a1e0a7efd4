"""The vision encoder: a small pre-norm ViT with the layout of llama.cpp's ``clip`` graph (LLaVA, projector ``mlp``).

It is pretrained alone to name colour, shape and digit from a random part of its tokens, so that every picture is
described redundantly, as with real encoders; then it is frozen and its features are cached.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_csp.demo.scenes import COLORS, IMAGE_SIZE, SHAPES

from .optim import MuonAdamW, cpu_seconds, schedule

PATCH = 8
N_TOKENS = (IMAGE_SIZE // PATCH) ** 2
N_EMBD = 128
N_LAYER = 3
N_HEAD = 4
N_FF = 256
EPS = 1e-5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(N_EMBD, eps=EPS)
        self.attn_q = nn.Linear(N_EMBD, N_EMBD)
        self.attn_k = nn.Linear(N_EMBD, N_EMBD)
        self.attn_v = nn.Linear(N_EMBD, N_EMBD)
        self.attn_out = nn.Linear(N_EMBD, N_EMBD)
        self.ln2 = nn.LayerNorm(N_EMBD, eps=EPS)
        self.ffn_up = nn.Linear(N_EMBD, N_FF)
        self.ffn_down = nn.Linear(N_FF, N_EMBD)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        h = self.ln1(x)
        q, k, v = (f(h).view(b, t, N_HEAD, -1).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v))
        h = F.scaled_dot_product_attention(q.float(), k.float(), v.float())  # the bfloat16 backward is far slower
        h = h.transpose(1, 2).reshape(b, t, N_EMBD)
        x = x + self.attn_out(h)
        return x + self.ffn_down(F.gelu(self.ffn_up(self.ln2(x)), approximate="tanh"))


class VisionEncoder(nn.Module):
    """Pictures (n, 3, 64, 64) in -1..1 to features (n, 64, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embd = nn.Conv2d(3, N_EMBD, PATCH, stride=PATCH)
        self.position_embd = nn.Parameter(0.02 * torch.randn(N_TOKENS, N_EMBD))
        self.blk = nn.ModuleList(Block() for _ in range(N_LAYER))
        self.post_ln = nn.LayerNorm(N_EMBD, eps=EPS)

    def forward(self, pixels: Tensor, keep: Tensor | None = None) -> Tensor:
        """``keep`` (n, k) names the patches to look at, to train faster; all by default."""
        x = self.patch_embd(pixels).flatten(2).transpose(1, 2) + self.position_embd
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, N_EMBD))
        for block in self.blk:
            x = block(x)
        return self.post_ln(x)


class Projector(nn.Module):
    """Features (..., 128) to embeddings of the language model (..., 128)."""

    def __init__(self, n_embd_text: int) -> None:
        super().__init__()
        self.mm_0 = nn.Linear(N_EMBD, N_EMBD)
        self.mm_2 = nn.Linear(N_EMBD, n_embd_text)

    def forward(self, x: Tensor) -> Tensor:
        return self.mm_2(F.gelu(self.mm_0(x), approximate="tanh"))


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(n, 64, 64, 3) uint8 to (n, 3, 64, 64) in -1..1: mean and std 0.5, as the exported model declares."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class Heads(nn.Module):
    """Read colour, shape and digit twice: from the mean over tokens, and from where an attention vector looks.

    The first asks for redundancy, the second for detail. Dropped after pretraining.
    """

    sizes = (len(COLORS), len(SHAPES), 10)

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(N_EMBD, len(self.sizes))
        self.from_look = nn.ModuleList(nn.Linear(N_EMBD, n) for n in self.sizes)
        self.from_mean = nn.ModuleList(nn.Linear(N_EMBD, n) for n in self.sizes)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """Features (n, 64, 128), kept tokens (n, 64) bool or all; per attribute the two logits (n, classes)."""
        n, t, _ = features.shape
        keep = torch.ones(n, t, dtype=torch.bool) if keep is None else keep
        weight = keep.float() / keep.sum(1, keepdim=True)
        mean = torch.einsum("nt,ntd->nd", weight, features)
        look = self.look(features).masked_fill(~keep[..., None], -torch.inf).softmax(1)
        seen = torch.einsum("nta,ntd->and", look, features)
        return [(head(s), flat(mean)) for s, head, flat in zip(seen, self.from_look, self.from_mean, strict=True)]


def busiest_patches(pictures: np.ndarray, k: int) -> Tensor:
    """The k patches of each picture with the largest contrast, (n, k): where shape and digit are."""
    n, side = len(pictures), IMAGE_SIZE // PATCH
    contrast = np.empty((n, side * side), dtype=np.float32)
    for i in range(0, n, 2000):
        part = pictures[i : i + 2000].mean(-1).reshape(-1, side, PATCH, side, PATCH)
        contrast[i : i + 2000] = part.std((2, 4)).reshape(-1, side * side)
    return torch.from_numpy(np.sort(np.argsort(-contrast, axis=1)[:, :k], axis=1))


def random_keep(n: int, t: int) -> Tensor:
    """Random part (40-100 %) of each picture's tokens, (n, t) bool."""
    keep = torch.rand(n, t) < torch.empty(n, 1).uniform_(0.4, 1.0)
    keep[:, 0] |= ~keep.any(1)
    return keep


@torch.no_grad()
def encode(encoder: VisionEncoder, pictures: np.ndarray, batch: int = 256) -> Tensor:
    """Features of all pictures, (n, 64, 128) bfloat16."""
    encoder.eval()
    out = torch.empty(len(pictures), N_TOKENS, N_EMBD, dtype=torch.bfloat16)
    for i in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            out[i : i + batch] = encoder(to_pixels(pictures[i : i + batch])).to(torch.bfloat16)
    return out


@torch.no_grad()
def accuracy(encoder: VisionEncoder, heads: Heads, pictures: np.ndarray, labels: np.ndarray) -> list[float]:
    """Share of right colours, shapes and digits."""
    target = torch.from_numpy(labels)
    parts = heads(encode(encoder, pictures).float())
    return [float((look.argmax(-1) == target[:, i]).float().mean()) for i, (look, _) in enumerate(parts)]


def pretrain(
    pictures: np.ndarray, labels: np.ndarray, test: tuple[np.ndarray, np.ndarray], minutes: float
) -> VisionEncoder:
    """Train a new encoder for the given time; the test pictures are only reported on.

    The first 70 % of the time it sees only the busier half of every picture's patches, which doubles the speed.
    """
    encoder, heads = VisionEncoder(), Heads()
    busiest = busiest_patches(pictures, N_TOKENS // 2)
    matrices = [p for n, p in encoder.named_parameters() if p.ndim == 2 and "position" not in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in (*encoder.parameters(), *heads.parameters()) if id(p) not in chosen]
    optimizer = MuonAdamW(matrices, rest, lr_muon=0.02, lr_adam=2e-3)
    target = torch.from_numpy(labels)
    start, step, batch = cpu_seconds(), 0, 64
    order = torch.randperm(len(pictures))
    while (progress := (cpu_seconds() - start) / (60 * minutes)) < 1.0:
        at = step * batch % (len(pictures) - batch + 1)
        if at < batch:
            order = torch.randperm(len(pictures))
        index = order[at : at + batch]
        encoder.train()
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(to_pixels(pictures[index.numpy()]), busiest[index] if progress < 0.7 else None)
        parts = heads(features.float(), random_keep(*features.shape[:2]))
        losses = [F.cross_entropy(look, target[index, i]) + 0.5 * F.cross_entropy(mean, target[index, i])
                  for i, (look, mean) in enumerate(parts)]  # fmt: skip
        loss = torch.stack(losses).sum()
        loss.backward()
        optimizer.step(schedule(progress, decay=0.7))
        if step % 400 == 0:
            right = accuracy(encoder, heads, *(x[:300] for x in test))
            print(f"vision step {step} {progress:.0%} loss {loss.item():.3f} held-out {right}", flush=True)
        step += 1
    right = accuracy(encoder, heads, *test)
    print(f"vision: {step} steps, held-out colour {right[0]:.3f} shape {right[1]:.3f} digit {right[2]:.3f}", flush=True)
    return encoder
