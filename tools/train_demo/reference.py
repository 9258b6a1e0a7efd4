"""The exported model in torch: logits to compare llama.cpp with, and a look at what a pruned cache would answer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_csp.demo.albums import Album

from .albums import tokenizer
from .chat import segments
from .language import N_EMBD as N_EMBD_TEXT
from .language import N_HEAD, N_HEAD_KV, LanguageModel, causal_attention
from .vision import Projector, VisionEncoder, to_pixels


class Reference:
    """Both GGUF files read back into torch, float32 arithmetic on the float16 weights."""

    def __init__(self, text: Path, mmproj: Path) -> None:
        self.model = LanguageModel(len(tokenizer()))
        self.encoder, self.projector = VisionEncoder(), Projector(N_EMBD_TEXT)
        self.model.load_state_dict(_tensors(text))
        vision = _tensors(mmproj)
        encoder = {k.removeprefix("v."): v for k, v in vision.items() if k.startswith("v.")}
        encoder["position_embd"] = encoder.pop("position_embd.weight")
        self.encoder.load_state_dict(encoder)
        self.projector.load_state_dict({k.replace("mm.", "mm_"): v for k, v in vision.items() if k.startswith("mm.")})
        for module in (self.model, self.encoder, self.projector):
            module.eval()

    @torch.no_grad()
    def embed_pictures(self, pictures: np.ndarray) -> Tensor:
        """(n, 64, 64, 3) uint8 to embeddings (n, 64, 128)."""
        return self.projector(self.encoder(to_pixels(pictures)))

    @torch.no_grad()
    def answer_logits(
        self, album: Album, embedded: Tensor, question: str, answer: str, keep: float = 1.0, n_window: int = 16
    ) -> tuple[Tensor, list[int]]:
        """Logits (n, n_vocab) that predict the n tokens of the right answer and the end, and those tokens.

        With ``keep`` < 1 the cue and all that follows see, per layer and KV head, only that share of the cells before
        the window: those to which the window's ``n_window`` queries, the cue included, attended most (average pooled
        over 5 cells, as in SnapKV).
        """
        tok = tokenizer()
        messages = [*album.messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows: list[Tensor] = []
        wanted: list[int] = []
        picture = 0
        for segment in segments(messages):
            if segment.kind == "image":
                rows.append(embedded[picture])
                picture += 1
                continue
            ids = [tok.id[segment.text]] if segment.kind == "control" else list(tok.encode(segment.text))
            rows.append(self.model.token_embd(torch.tensor(ids)))
            wanted += ids if segment.kind == "answer" or (wanted and segment.kind == "control") else []
        x = torch.cat(rows)[None, :-1]  # the last token, the end, is only predicted
        cue = x.shape[1] - len(wanted)
        attention = causal_attention if keep >= 1.0 else pruned_attention(cue, keep, n_window)
        _, hidden = self.model(x, torch.arange(x.shape[1])[None], attention)
        return self.model.logits(hidden[0, cue:]), wanted


def pruned_attention(cue: int, keep: float, n_window: int):  # type: ignore[no-untyped-def]
    """Attention in which position ``cue`` and later ones see the window and the best cells before it."""

    def attention(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[2]
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(
            torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf
        )
        first = cue + 1 - n_window  # the window is [first, cue]
        votes = weights[0, :, first : cue + 1].softmax(-1)[:, :, :first].sum(1)
        votes = F.avg_pool1d(votes.view(N_HEAD_KV, N_HEAD // N_HEAD_KV, -1).sum(1)[:, None], 5, 1, 2)[:, 0]
        kept = votes.topk(max(1, round(keep * first)), dim=-1).indices
        gone = torch.ones(N_HEAD_KV, t, dtype=torch.bool).scatter_(1, kept, False)
        gone[:, first:] = False
        weights[0, :, cue:] = weights[0, :, cue:].masked_fill(
            gone.repeat_interleave(N_HEAD // N_HEAD_KV, 0)[:, None], -torch.inf
        )
        return weights.softmax(-1) @ v

    return attention


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file in torch's order of dimensions, float32."""
    return {
        t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)).reshape(*(int(n) for n in reversed(t.shape)))
        for t in gguf.GGUFReader(path).tensors
    }
