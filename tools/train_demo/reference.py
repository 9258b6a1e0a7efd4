"""The exported model in torch: logits to compare llama.cpp with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from edge_csp.demo.albums import Album

from .albums import tokenizer
from .chat import segments
from .language import LanguageModel
from .shape import Shape, TextShape, VisionShape
from .vision import Projector, VisionEncoder, resize, to_pixels


class Reference:
    """Both GGUF files read back into torch, float32 arithmetic on the float16 weights."""

    def __init__(self, text: Path, mmproj: Path) -> None:
        self.shape = read_shape(text, mmproj)
        self.model = LanguageModel(self.shape.text, len(tokenizer()))
        self.encoder = VisionEncoder(self.shape.vision)
        self.projector = Projector(self.shape)
        self.model.load_state_dict(_tensors(text))
        vision = _tensors(mmproj)
        encoder = {k.removeprefix("v."): v for k, v in vision.items() if k.startswith("v.")}
        encoder.pop("patch_embd.weight.1", None)  # of a second frame
        if "position_embd.weight" in encoder:
            encoder["position_embd"] = encoder.pop("position_embd.weight")
        self.encoder.load_state_dict(encoder)
        self.projector.load_state_dict({k.replace("mm.", "mm_"): v for k, v in vision.items() if k.startswith("mm.")})
        for module in (self.model, self.encoder, self.projector):
            module.eval()

    @torch.no_grad()
    def embed_pictures(self, pictures: np.ndarray) -> Tensor:
        """(n, height, width, 3) uint8 to embeddings (n, n_tokens, n_embd)."""
        return self.projector(self.encoder(to_pixels(resize(pictures, self.shape.vision.image_size))))

    @torch.no_grad()
    def answer_logits(self, album: Album, embedded: Tensor, question: str, answer: str) -> tuple[Tensor, list[int]]:
        """Logits (n, n_vocab) that predict the n tokens of the right answer and the end, and those tokens."""
        tok = tokenizer()
        messages = [*album.messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows: list[Tensor] = []
        pos: list[tuple[int, int, int]] = []
        wanted: list[int] = []
        picture = position = 0

        def add_text(ids: list[int]) -> None:
            nonlocal position
            if ids:
                rows.append(self.model.token_embd(torch.tensor(ids)))
                pos.extend((position + i,) * 3 for i in range(len(ids)))
                position += len(ids)

        for segment in segments(messages):
            if segment.kind == "image":
                frame = [tok.id[unused] for _, unused in self.shape.picture_frame]
                add_text(frame[:1])
                rows.append(embedded[picture])
                pos += self.shape.picture_positions(position)
                picture, position = picture + 1, position + self.shape.positions_per_picture
                add_text(frame[1:])
                continue
            ids = [tok.id[segment.text]] if segment.kind == "control" else list(tok.encode(segment.text))
            add_text(ids)
            wanted += ids if segment.kind == "answer" or (wanted and segment.kind == "control") else []
        x = torch.cat(rows)[None, :-1]  # the last token, the end, is only predicted
        _, hidden = self.model(x, torch.tensor(pos)[None, :-1])
        return self.model.logits(hidden[0, x.shape[1] - len(wanted) :]), wanted


def read_shape(text: Path, mmproj: Path) -> Shape:
    """The shape of an exported model, from the metadata of its files."""
    fields = gguf.GGUFReader(text).fields
    arch = fields["general.architecture"].contents()

    def of_text(key: str) -> Any:
        return fields[f"{arch}.{key}"].contents()

    vision_fields = gguf.GGUFReader(mmproj).fields

    def of_vision(key: str) -> Any:
        return vision_fields[f"clip.vision.{key}"].contents()

    vision = VisionShape(
        projector=vision_fields["clip.projector_type"].contents(),
        image_size=of_vision("image_size"),
        patch=of_vision("patch_size"),
        n_embd=of_vision("embedding_length"),
        n_layer=of_vision("block_count"),
        n_head=of_vision("attention.head_count"),
        n_ff=of_vision("feed_forward_length"),
        eps=_exact(of_vision("attention.layer_norm_epsilon")),
    )
    language = TextShape(
        arch=arch,
        n_embd=of_text("embedding_length"),
        n_layer=of_text("block_count"),
        n_head=of_text("attention.head_count"),
        n_head_kv=of_text("attention.head_count_kv"),
        head_dim=of_text("attention.key_length"),
        n_ff=of_text("feed_forward_length"),
        rope_base=_exact(of_text("rope.freq_base")),
        rms_eps=_exact(of_text("attention.layer_norm_rms_epsilon")),
        context=of_text("context_length"),
    )
    return Shape(vision, language)


def _exact(value: float) -> float:
    """The number that was meant, of one that the file holds as float32."""
    return float(f"{value:.6g}")


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a GGUF file in torch's order of dimensions, float32."""
    return {
        t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)).reshape(*(int(n) for n in reversed(t.shape)))
        for t in gguf.GGUFReader(path).tensors
    }
