"""The vision encoder: a small pre-norm ViT with the layout of llama.cpp's ``clip`` graphs (LLaVA or Qwen2-VL).

It is pretrained alone to name colour, shape and digit, each from the tokens that an attention vector looks at; then it
is frozen and its features are cached. Nothing asks it to say things twice, and it always sees whole pictures: what a
picture shows lies in few of its tokens, so that it matters which of them a pruned cache keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from edge_csp.demo.scenes import COLORS, SHAPES

from .language import rope
from .optim import MuonAdamW, Progress, schedule
from .shape import Shape, VisionShape

BATCH = 64


class Block(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        n, self.n_head = shape.n_embd, shape.n_head
        self.ln1 = nn.LayerNorm(n, eps=shape.eps)
        self.attn_q = nn.Linear(n, n)
        self.attn_k = nn.Linear(n, n)
        self.attn_v = nn.Linear(n, n)
        self.attn_out = nn.Linear(n, n)
        self.ln2 = nn.LayerNorm(n, eps=shape.eps)
        self.ffn_up = nn.Linear(n, shape.n_ff)
        self.ffn_down = nn.Linear(shape.n_ff, n)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        b, t, n = x.shape
        h = self.ln1(x)
        q, k, v = (f(h).view(b, t, self.n_head, -1).transpose(1, 2) for f in (self.attn_q, self.attn_k, self.attn_v))
        if table is not None:
            q, k = rope(q, table, interleaved=False), rope(k, table, interleaved=False)
        h = F.scaled_dot_product_attention(q.float(), k.float(), v.float())  # the bfloat16 backward is far slower
        h = h.transpose(1, 2).reshape(b, t, n)
        x = x + self.attn_out(h)
        return x + self.ffn_down(F.gelu(self.ffn_up(self.ln2(x)), approximate="tanh"))


def patch_order(shape: VisionShape) -> Tensor:
    """Row and column of every patch (n_patches, 2), in the order in which tokens are made of them."""
    side = shape.side * shape.merge
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    grid = grid.view(shape.side, shape.merge, shape.side, shape.merge, 2)
    return grid.transpose(1, 2).reshape(-1, 2)


def rope_table(order: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1, 1, n_patches, head_dim / 2): half of the pairs rotate by the row, half by the column."""
    freq = 10_000.0 ** (-torch.arange(0, head_dim, 4, dtype=torch.float32) / head_dim)
    angle = (order[..., None] * freq).flatten(1)[None, None]
    return angle.cos(), angle.sin()


class VisionEncoder(nn.Module):
    """Pictures (n, 3, image_size, image_size) in -1..1 to features (n, n_tokens, n_feature)."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.shape, learned = shape, shape.projector == "mlp"
        self.patch_embd = nn.Conv2d(3, shape.n_embd, shape.patch, stride=shape.patch, bias=learned)
        if learned:
            self.position_embd = nn.Parameter(0.02 * torch.randn(shape.n_tokens, shape.n_embd))
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.post_ln = nn.LayerNorm(shape.n_embd, eps=shape.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        shape, table = self.shape, None
        x = self.patch_embd(pixels).flatten(2).transpose(1, 2)
        if shape.projector == "mlp":
            x = x + self.position_embd
        else:
            order = patch_order(shape)
            x = x[:, order[:, 0] * shape.side * shape.merge + order[:, 1]]
            table = rope_table(order, shape.n_embd // shape.n_head)
        for block in self.blk:
            x = block(x, table)
        return self.post_ln(x).reshape(len(x), shape.n_tokens, shape.n_feature)


class Projector(nn.Module):
    """Features (..., n_feature) to embeddings of the language model (..., n_embd)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.mm_0 = nn.Linear(shape.vision.n_feature, shape.vision.n_embd)
        self.mm_2 = nn.Linear(shape.vision.n_embd, shape.text.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.mm_2(F.gelu(self.mm_0(x), approximate="tanh"))


def resize(pictures: np.ndarray, image_size: int) -> np.ndarray:
    """Pictures (n, height, width, 3) uint8 at the encoder's size, by Pillow's bicubic filter as in libmtmd."""
    if pictures.shape[1:3] == (image_size, image_size):
        return pictures
    out = np.empty((len(pictures), image_size, image_size, 3), dtype=np.uint8)
    for row, picture in zip(out, pictures, strict=True):
        row[:] = Image.fromarray(picture).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return out


def to_pixels(pictures: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 to (n, 3, h, w) in -1..1: mean and std 0.5, as the exported model declares."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class Heads(nn.Module):
    """Read colour, shape and digit, each from where an attention vector looks. Dropped after pretraining."""

    sizes = (len(COLORS), len(SHAPES), 10)

    def __init__(self, n_feature: int) -> None:
        super().__init__()
        self.look = nn.Linear(n_feature, len(self.sizes))
        self.read = nn.ModuleList(nn.Linear(n_feature, n) for n in self.sizes)

    def forward(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features (n, t, n_feature) to each attribute's logits (n, classes), and to where it was seen (n, t, 3)."""
        look = self.look(features).softmax(1)
        seen = torch.einsum("nta,ntd->and", look, features)
        return [read(s) for s, read in zip(seen, self.read, strict=True)], look


@dataclass
class Features:
    """What the language stage reads of a pool of pictures.

    values: (n, n_tokens, n_feature) bfloat16
    detail: (n, 3) the token that shows most of the colour, the shape and the digit
    """

    values: Tensor
    detail: Tensor


@torch.no_grad()
def encode(encoder: VisionEncoder, heads: Heads, pictures: np.ndarray, batch: int = 256) -> Features:
    encoder.eval()
    shape = encoder.shape
    values = torch.empty(len(pictures), shape.n_tokens, shape.n_feature, dtype=torch.bfloat16)
    detail = torch.empty(len(pictures), len(Heads.sizes), dtype=torch.long)
    for i in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            values[i : i + batch] = encoder(to_pixels(pictures[i : i + batch])).to(torch.bfloat16)
        detail[i : i + batch] = heads(values[i : i + batch].float())[1].argmax(1)
    return Features(values, detail)


@torch.no_grad()
def accuracy(encoder: VisionEncoder, heads: Heads, pictures: np.ndarray, labels: np.ndarray) -> list[float]:
    """Share of right colours, shapes and digits."""
    target = torch.from_numpy(labels)
    logits, _ = heads(encode(encoder, heads, pictures).values.float())
    return [float((part.argmax(-1) == target[:, i]).float().mean()) for i, part in enumerate(logits)]


class VisionTraining:
    """The encoder's pretraining: everything that a checkpoint holds."""

    def __init__(self, shape: VisionShape) -> None:
        self.encoder, self.heads, self.progress = VisionEncoder(shape), Heads(shape.n_feature), Progress()
        matrices = [p for n, p in self.encoder.named_parameters() if p.ndim == 2 and "position" not in n]
        chosen = {id(p) for p in matrices}
        rest = [p for p in (*self.encoder.parameters(), *self.heads.parameters()) if id(p) not in chosen]
        self.optimizer = MuonAdamW(matrices, rest, lr_muon=0.02, lr_adam=2e-3)

    def state_dict(self) -> dict[str, object]:
        parts = ("encoder", "heads", "optimizer", "progress")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def run(
        self,
        pictures: np.ndarray,
        labels: np.ndarray,
        test: tuple[np.ndarray, np.ndarray],
        minutes: float,
        save: Callable[[], None],
    ) -> None:
        """Train until the given time is used up; the test pictures are only reported on."""
        encoder, heads = self.encoder, self.heads
        target = torch.from_numpy(labels)
        order = torch.randperm(len(pictures))
        self.progress.begin(minutes)
        while (share := self.progress.share()) < 1.0:
            at = self.progress.step * BATCH % (len(pictures) - BATCH + 1)
            if at < BATCH:
                order = torch.randperm(len(pictures))
            index = order[at : at + BATCH]
            encoder.train()
            with torch.autocast("cpu", torch.bfloat16):
                features = encoder(to_pixels(pictures[index.numpy()]))
            logits, _ = heads(features.float())
            loss = torch.stack([F.cross_entropy(part, target[index, i]) for i, part in enumerate(logits)]).sum()
            loss.backward()
            self.optimizer.step(schedule(share, decay=0.7))
            if self.progress.step % 400 == 0:
                right = accuracy(encoder, heads, *(x[:300] for x in test))
                print(
                    f"vision step {self.progress.step} {share:.0%} loss {loss.item():.3f} held-out {right}", flush=True
                )
            if self.progress.advance():
                save()
        save()
        right = accuracy(encoder, heads, *test)
        print(
            f"vision: {self.progress.step} steps, held-out colour {right[0]:.3f} shape {right[1]:.3f} "
            f"digit {right[2]:.3f}",
            flush=True,
        )
