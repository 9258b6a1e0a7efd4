"""Tiny GGUF models with random weights: large enough to be wrong in every way, small enough to load in milliseconds.

Attention is far from uniform: the logits of q.k have a standard deviation of about 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Tensors = dict[str, npt.NDArray[np.float32]]

CONTEXT_LENGTH = 4096
ROPE_BASE = 10000.0
RMS_EPS = 1e-5


def make_model(
    path: Path,
    arch: str,
    *,
    n_layer: int = 3,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 32,
    n_ff: int = 96,
    n_vocab: int = 96,
    seed: int = 0,
    dtype: str = "f32",
    tied: bool = False,
) -> Path:
    """Write a model without a tokenizer and return its path.

    arch:  llama, qwen2, qwen2vl (M-RoPE), gemma3 (sliding window 16, every sixth layer full), gpt-oss (the same, every
           second layer full, attention sinks), lfm2 (hybrid: convolution and attention in turns), mamba (recurrent) or
           deepseek2 (MLA)
    dtype: of the matrices, f32 or f16
    tied:  the output matrix is the token embedding
    """
    builder = _Builder(np.random.default_rng(seed), n_layer, n_head, n_head_kv, head_dim, n_ff)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_block_count(n_layer)
    writer.add_embedding_length(builder.n_embd)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("none")
    tensors = {"token_embd.weight": builder.normal(n_vocab, builder.n_embd)}
    tensors["token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight"] = builder.norm()
    if not tied:
        tensors["output.weight"] = builder.matrix(n_vocab, builder.n_embd, gain=3)
    layer = _ARCHITECTURES[arch](builder, writer)
    for il in range(n_layer):
        tensors |= {f"blk.{il}.{name}": tensor for name, tensor in layer().items()}
    for name, tensor in tensors.items():
        is_matrix = tensor.ndim > 1 and not name.endswith(".bias") and ".ssm_" not in name and ".conv." not in name
        writer.add_tensor(name, tensor.astype(np.float16) if is_matrix and dtype == "f16" else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Builder:
    def __init__(
        self, generator: np.random.Generator, n_layer: int, n_head: int, n_head_kv: int, head_dim: int, n_ff: int
    ) -> None:
        self.generator = generator
        self.n_layer, self.n_head, self.n_head_kv, self.head_dim, self.n_ff = n_layer, n_head, n_head_kv, head_dim, n_ff
        self.n_embd = n_head * head_dim

    def normal(self, *shape: int, std: float = 1, mean: float = 0) -> npt.NDArray[np.float32]:
        return (mean + std * self.generator.standard_normal(shape)).astype(np.float32)

    def matrix(self, n_out: int, n_in: int, gain: float = 1) -> npt.NDArray[np.float32]:
        return self.normal(n_out, n_in, std=gain / np.sqrt(n_in))

    def norm(self, n: int = 0) -> npt.NDArray[np.float32]:
        return self.normal(n or self.n_embd, std=0.1, mean=1)

    def feed_forward(self) -> Tensors:
        return {
            "ffn_norm.weight": self.norm(),
            "ffn_gate.weight": self.matrix(self.n_ff, self.n_embd),
            "ffn_up.weight": self.matrix(self.n_ff, self.n_embd),
            "ffn_down.weight": self.matrix(self.n_embd, self.n_ff),
        }

    def attention(self, bias: bool) -> Tensors:
        n_kv = self.n_head_kv * self.head_dim
        tensors = {
            "attn_norm.weight": self.norm(),
            "attn_q.weight": self.matrix(self.n_embd, self.n_embd, gain=1.5),
            "attn_k.weight": self.matrix(n_kv, self.n_embd, gain=1.5),
            "attn_v.weight": self.matrix(n_kv, self.n_embd),
            "attn_output.weight": self.matrix(self.n_embd, self.n_embd),
        }
        if bias:
            tensors |= {
                f"attn_{name}.bias": self.normal(len(tensors[f"attn_{name}.weight"]), std=0.5) for name in "qkv"
            }
        return tensors


LayerMaker = Callable[[], Tensors]


def _write_attention(builder: _Builder, writer: gguf.GGUFWriter, n_head_kv: list[int] | None = None) -> None:
    writer.add_feed_forward_length(builder.n_ff)
    writer.add_head_count(builder.n_head)
    writer.add_head_count_kv(n_head_kv or builder.n_head_kv)
    writer.add_rope_dimension_count(builder.head_dim)
    writer.add_rope_freq_base(ROPE_BASE)


def _llama(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    _write_attention(builder, writer)
    return lambda: builder.attention(bias=False) | builder.feed_forward()


def _qwen2(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    _write_attention(builder, writer)
    return lambda: builder.attention(bias=True) | builder.feed_forward()


def _qwen2vl(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    half = builder.head_dim // 2
    writer.add_rope_dimension_sections([half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8, 0])
    return _qwen2(builder, writer)


def _gemma3(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    _write_attention(builder, writer)
    writer.add_key_length(builder.head_dim)
    writer.add_value_length(builder.head_dim)
    writer.add_sliding_window(16)
    return lambda: (
        builder.attention(bias=False)
        | builder.feed_forward()
        | {
            "attn_q_norm.weight": builder.norm(builder.head_dim),
            "attn_k_norm.weight": builder.norm(builder.head_dim),
            "post_attention_norm.weight": builder.norm(),
            "post_ffw_norm.weight": builder.norm(),
        }
    )


def _gpt_oss(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    n_embd, n_ff, n_expert = builder.n_embd, builder.n_ff, 4
    _write_attention(builder, writer)
    writer.add_key_length(builder.head_dim)
    writer.add_value_length(builder.head_dim)
    writer.add_sliding_window(16)
    writer.add_expert_count(n_expert)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(n_ff)

    def experts(n_out: int, n_in: int) -> npt.NDArray[np.float32]:
        return builder.normal(n_expert, n_out, n_in, std=1 / np.sqrt(n_in))

    return lambda: (
        builder.attention(bias=True)
        | {
            "attn_output.bias": builder.normal(n_embd, std=0.1),
            "attn_sinks.weight": builder.normal(builder.n_head, std=2),
            "post_attention_norm.weight": builder.norm(),
            "ffn_gate_inp.weight": builder.matrix(n_expert, n_embd),
            "ffn_gate_inp.bias": builder.normal(n_expert, std=0.1),
            "ffn_gate_exps.weight": experts(n_ff, n_embd),
            "ffn_gate_exps.bias": builder.normal(n_expert, n_ff, std=0.1),
            "ffn_up_exps.weight": experts(n_ff, n_embd),
            "ffn_up_exps.bias": builder.normal(n_expert, n_ff, std=0.1),
            "ffn_down_exps.weight": experts(n_embd, n_ff),
            "ffn_down_exps.bias": builder.normal(n_expert, n_embd, std=0.1),
        }
    )


def _lfm2(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    """Attention in the layers 1, 3, 5 …"""
    n_embd, n_conv, is_attention = builder.n_embd, 3, itertools.cycle([False, True])
    _write_attention(builder, writer, n_head_kv=[builder.n_head_kv * (il % 2) for il in range(builder.n_layer)])
    writer.add_shortconv_l_cache(n_conv)

    def layer() -> Tensors:
        if next(is_attention):
            tensors = builder.attention(bias=False)
            tensors |= {f"attn_{name}_norm.weight": builder.norm(builder.head_dim) for name in "qk"}
        else:
            tensors = {
                "attn_norm.weight": builder.norm(),
                "shortconv.conv.weight": builder.normal(n_embd, n_conv, std=0.5),
                "shortconv.in_proj.weight": builder.matrix(3 * n_embd, n_embd),
                "shortconv.out_proj.weight": builder.matrix(n_embd, n_embd),
            }
        return tensors | builder.feed_forward()

    return layer


def _mamba(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    n_embd, n_inner, n_conv, n_state, n_rank = builder.n_embd, 2 * builder.n_embd, 4, 8, 8
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(n_conv)
    writer.add_ssm_inner_size(n_inner)
    writer.add_ssm_state_size(n_state)
    writer.add_ssm_time_step_rank(n_rank)
    return lambda: {
        "attn_norm.weight": builder.norm(),
        "ssm_in.weight": builder.matrix(2 * n_inner, n_embd),
        "ssm_conv1d.weight": builder.matrix(n_inner, n_conv),
        "ssm_conv1d.bias": builder.normal(n_inner, std=0.1),
        "ssm_x.weight": builder.matrix(n_rank + 2 * n_state, n_inner),
        "ssm_dt.weight": builder.matrix(n_inner, n_rank),
        "ssm_dt.bias": builder.normal(n_inner, std=0.1),
        "ssm_a": -np.exp(builder.normal(n_inner, n_state, std=0.5)),
        "ssm_d": builder.normal(n_inner, mean=1, std=0.1),
        "ssm_out.weight": builder.matrix(n_embd, n_inner),
    }


def _deepseek2(builder: _Builder, writer: gguf.GGUFWriter) -> LayerMaker:
    n_embd, n_head, n_rot, n_nope, rank_q, rank_kv = builder.n_embd, builder.n_head, 16, builder.head_dim, 32, 64
    writer.add_feed_forward_length(builder.n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(n_rot)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_leading_dense_block_count(builder.n_layer)
    writer.add_expert_shared_count(0)
    writer.add_expert_feed_forward_length(builder.n_ff)
    writer.add_q_lora_rank(rank_q)
    writer.add_kv_lora_rank(rank_kv)
    writer.add_key_length(rank_kv + n_rot)
    writer.add_value_length(rank_kv)
    writer.add_key_length_mla(n_nope + n_rot)
    writer.add_value_length_mla(n_nope)
    return lambda: (
        builder.feed_forward()
        | {
            "attn_norm.weight": builder.norm(),
            "attn_q_a_norm.weight": builder.norm(rank_q),
            "attn_kv_a_norm.weight": builder.norm(rank_kv),
            "attn_q_a.weight": builder.matrix(rank_q, n_embd),
            "attn_q_b.weight": builder.matrix(n_head * (n_nope + n_rot), rank_q),
            "attn_kv_a_mqa.weight": builder.matrix(rank_kv + n_rot, n_embd),
            "attn_k_b.weight": builder.normal(n_head, rank_kv, n_nope, std=0.2),
            "attn_v_b.weight": builder.normal(n_head, n_nope, rank_kv, std=0.2),
            "attn_output.weight": builder.matrix(n_embd, n_head * n_nope),
        }
    )


_ARCHITECTURES: dict[str, Callable[[_Builder, gguf.GGUFWriter], LayerMaker]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2vl": _qwen2vl,
    "gemma3": _gemma3,
    "gpt-oss": _gpt_oss,
    "lfm2": _lfm2,
    "mamba": _mamba,
    "deepseek2": _deepseek2,
}
