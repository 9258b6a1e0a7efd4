"""Models to measure: random weights at the shapes of real models, or a file of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp.errors import BenchError
from edge_csp.metadata import GgufInfo, read_info

Tensor = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """A text model of the llama architecture. of: the model that it has the shape of."""

    of: str
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    tied: bool
    """The output matrix is the token embedding."""


SHAPES = {
    "7b": Shape("LLaVA-1.5-7B", 32, 4096, 11008, 32, 32, 128, 32000, tied=False),
    "3b": Shape("Qwen2.5-VL-3B", 36, 2048, 11008, 16, 2, 128, 151936, tied=True),
    "1.7b": Shape("SmolVLM2-2.2B (text 1.7B)", 24, 2048, 8192, 32, 32, 64, 49152, tied=True),
    "135m": Shape("SmolVLM-256M (text 135M)", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "tiny": Shape("nothing real, for tests", 2, 64, 96, 2, 1, 32, 64, tied=True),
}
DEVIATIONS = "random Q4_0 weights, the same in every layer; architecture llama, without biases, RoPE of one dimension"


@dataclass(frozen=True)
class BenchModel:
    """A model to measure. deviations: how it differs from the real one, empty for a file of the user's own."""

    name: str
    path: Path
    info: GgufInfo
    deviations: tuple[str, ...]


@contextmanager
def opened(name: str, n_layer: int | None = None) -> Iterator[BenchModel]:
    """The model of this name: a shape, written to a temporary folder, or a GGUF file.

    n_layer: fewer layers than the shape has; the vocabulary shrinks with them, so that ratios of times stay.

    Raises BenchError if there is no such shape or file, or not as many layers; ModelError if the file is damaged.
    """
    if name not in SHAPES:
        if not Path(name).is_file():
            raise BenchError(f"model {name!r} is neither a file nor one of the shapes {', '.join(SHAPES)}")
        if n_layer is not None:
            raise BenchError(f"{name} has the layers that it has; --layers is for the shapes {', '.join(SHAPES)}")
        yield BenchModel(Path(name).name, Path(name), read_info(name), ())
        return
    shape = SHAPES[name]
    deviations = [f"shape of {shape.of}", DEVIATIONS]
    if n_layer is not None and n_layer != shape.n_layer:
        if not 1 <= n_layer < shape.n_layer:
            raise BenchError(f"{n_layer} layers were asked for, the shape {name} has 1 to {shape.n_layer}")
        n_vocab = max(32, shape.n_vocab * n_layer // shape.n_layer // 32 * 32)
        deviations.append(
            f"scaled: {n_layer} of {shape.n_layer} layers, {n_vocab} of {shape.n_vocab} tokens in the vocabulary"
        )
        shape = replace(shape, n_layer=n_layer, n_vocab=n_vocab)
    with TemporaryDirectory(prefix="edge-csp-bench-") as folder:
        path = Path(folder) / f"{name}.gguf"
        try:
            write_model(path, shape)
        except OSError as error:
            raise BenchError(f"{path} cannot be written ({error.strerror or error}): set TMPDIR") from error
        yield BenchModel(name, path, read_info(path), tuple(deviations))


def write_model(path: Path, shape: Shape) -> None:
    """Write a model with random weights in Q4_0, the same in every layer, and without a tokenizer."""
    import gguf

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(1 << 17)
    writer.add_block_count(shape.n_layer)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("none")

    def matrix(n_out: int, n_in: int) -> Tensor:
        """Blocks of 32 weights: an f16 scale and 16 bytes."""
        blocks = generator.integers(0, 256, (n_out, n_in // 32, 18), np.uint8)
        blocks[..., :2] = np.array([0.2 / np.sqrt(n_in)], np.float16).view(np.uint8)
        return blocks.reshape(n_out, -1)

    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    norm = np.ones(shape.n_embd, np.float32)
    layer = {
        "attn_norm.weight": norm,
        "attn_q.weight": matrix(n_q, shape.n_embd),
        "attn_k.weight": matrix(n_kv, shape.n_embd),
        "attn_v.weight": matrix(n_kv, shape.n_embd),
        "attn_output.weight": matrix(shape.n_embd, n_q),
        "ffn_norm.weight": norm,
        "ffn_gate.weight": matrix(shape.n_ff, shape.n_embd),
        "ffn_up.weight": matrix(shape.n_ff, shape.n_embd),
        "ffn_down.weight": matrix(shape.n_embd, shape.n_ff),
    }
    tensors: dict[str, Tensor] = {
        "token_embd.weight": matrix(shape.n_vocab, shape.n_embd),
        "output_norm.weight": norm,
    }
    if not shape.tied:
        tensors["output.weight"] = tensors["token_embd.weight"]
    tensors |= {f"blk.{il}.{name}": tensor for il in range(shape.n_layer) for name, tensor in layer.items()}
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
