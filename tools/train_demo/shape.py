"""The sizes of a model that tools/train_demo can train and export; the defaults are those of the embedded model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class VisionShape:
    """A ViT as llama.cpp's ``clip`` graphs compute it.

    projector: mlp (LLaVA: learned positions, a token per patch) or qwen2vl_merger (Qwen2-VL: RoPE over rows and
               columns, a token per square of four patches). Only the second goes with positions in two dimensions:
               with the first, libmtmd counts a picture as one row.
    """

    projector: Literal["mlp", "qwen2vl_merger"] = "mlp"
    image_size: int = 64  # pixels; pictures of another size are resized to it
    patch: int = 8
    n_embd: int = 128
    n_layer: int = 3
    n_head: int = 4
    n_ff: int = 256  # never n_embd: a legacy check of llama.cpp would swap up and down
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.image_size % (self.patch * self.merge):
            raise ValueError(f"{self.image_size} pixels cannot be cut into tokens of {self.patch * self.merge}")
        if self.n_ff == self.n_embd:
            raise ValueError(f"n_ff must differ from n_embd, both are {self.n_ff}")

    @property
    def merge(self) -> int:
        """Patches per token, along each side."""
        return 2 if self.projector == "qwen2vl_merger" else 1

    @property
    def side(self) -> int:
        """Tokens per row and per column."""
        return self.image_size // (self.patch * self.merge)

    @property
    def n_tokens(self) -> int:
        return self.side**2

    @property
    def n_feature(self) -> int:
        """Values per token that the projector sees."""
        return self.n_embd * self.merge**2


@dataclass(frozen=True)
class TextShape:
    """A decoder as llama.cpp computes it.

    arch: llama (RoPE over interleaved pairs), qwen3 (over halves, with a norm on every head's query and key) or qwen2vl
          (over halves, biases, and positions in two dimensions within a picture)
    """

    arch: Literal["llama", "qwen3", "qwen2vl"] = "llama"
    n_embd: int = 128
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 32
    n_ff: int = 256
    rope_base: float = 1e6
    rms_eps: float = 1e-5
    context: int = 4096

    def __post_init__(self) -> None:
        if self.n_head % self.n_head_kv:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_head_kv} KV heads")
        if self.arch == "qwen2vl" and self.n_head * self.head_dim != self.n_embd:
            raise ValueError(f"qwen2vl needs heads of {self.n_embd} values in all")

    @property
    def interleaved(self) -> bool:
        """Whether RoPE rotates the pairs (2i, 2i + 1); else (i, i + head_dim / 2)."""
        return self.arch == "llama"

    @property
    def qk_norm(self) -> bool:
        return self.arch == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        return self.arch == "qwen2vl"

    @property
    def mrope(self) -> bool:
        return self.arch == "qwen2vl"

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """How many pairs rotate by time, row and column: a quarter, and half of the rest each, as in Qwen2-VL."""
        half = self.head_dim // 2
        if not self.mrope:
            return half, 0, 0
        space = half * 3 // 8
        return half - 2 * space, space, space


@dataclass(frozen=True)
class Shape:
    """Both halves of a model, and the largest albums that it is trained on."""

    vision: VisionShape = field(default_factory=VisionShape)
    text: TextShape = field(default_factory=TextShape)
    max_pictures: int = 12

    def __post_init__(self) -> None:
        if self.text.mrope != (self.vision.projector == "qwen2vl_merger"):
            raise ValueError(f"{self.text.arch} does not go with the projector {self.vision.projector}")

    @property
    def picture_frame(self) -> tuple[tuple[str, str], ...]:
        """The tokens that libmtmd writes before and after a picture for this projector, each with the unused token of
        the vocabulary whose place it takes; empty if none.
        """
        if self.vision.projector == "mlp":
            return ()
        return ("<|vision_start|>", "<|unused_0|>"), ("<|vision_end|>", "<|unused_1|>")

    @property
    def positions_per_picture(self) -> int:
        """How many positions a picture takes: libmtmd counts the longer side under M-RoPE, else every token."""
        return self.vision.side if self.text.mrope else self.vision.n_tokens

    def picture_positions(self, start: int) -> list[tuple[int, int, int]]:
        """Time, row and column of every token of a picture that begins at a position."""
        if not self.text.mrope:
            return [(start + i,) * 3 for i in range(self.vision.n_tokens)]
        side = self.vision.side
        return [(start, start + i // side, start + i % side) for i in range(self.vision.n_tokens)]


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how many minutes of one core.

    name:     stored in both GGUF files
    n_scenes: pictures to train on
    """

    name: str
    shape: Shape = field(default_factory=Shape)
    seed: int = 1
    n_scenes: int = 20_000
    vision_minutes: float = 8
    language_minutes: float = 40
