"""Write the two GGUF files: text (the shape's architecture) and vision (``clip``, the shape's projector)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from .albums import tokenizer
from .chat import BOS, END, PAD, TEMPLATE
from .language import LanguageModel
from .vision import Projector, VisionEncoder


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices as float16, vectors and position embeddings as float32."""
    half = tensor.ndim > 1 and "position" not in name
    writer.add_tensor(name, tensor.detach().float().numpy().astype(np.float16 if half else np.float32))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, name: str) -> None:
    """What both files have in common, so that a frontend can tell that they belong together."""
    writer.add_name(name)
    writer.add_basename(name)
    writer.add_description("A tiny vision-language model for demonstrations and tests, trained by edge-csp")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def export_text(model: LanguageModel, frame: tuple[tuple[str, str], ...], path: Path, name: str) -> None:
    """Write the language model. frame: tokens around every picture, as in Shape.picture_frame."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, shape.arch)
    _describe(writer, name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    if shape.mrope:
        writer.add_rope_dimension_sections([*shape.rope_sections, 0])
    tok = tokenizer()
    writer.add_vocab_size(len(tok))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # whole pieces are looked up before any merge
    framed = {unused: token for token, unused in frame}
    writer.add_token_list([framed.get(token, token) for token in tok.tokens])
    kinds = [gguf.TokenType.CONTROL if tok.is_control(i) else gguf.TokenType.NORMAL for i in range(len(tok))]
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 0"])  # the key has to exist; no two pieces are ever merged
    writer.add_bos_token_id(tok.id[BOS])
    writer.add_eos_token_id(tok.id[END])
    writer.add_eot_token_id(tok.id[END])
    writer.add_pad_token_id(tok.id[PAD])
    writer.add_add_bos_token(False)  # the template writes it
    writer.add_chat_template(TEMPLATE)
    for key, tensor in model.state_dict().items():
        _add(writer, key, tensor)
    _finish(writer)


def export_mmproj(encoder: VisionEncoder, projector: Projector, path: Path, name: str) -> None:
    shape = encoder.shape
    writer = gguf.GGUFWriter(path, "clip")
    _describe(writer, name)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(shape.projector)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(shape.image_size)
    writer.add_vision_patch_size(shape.patch)
    writer.add_vision_embedding_length(shape.n_embd)
    writer.add_vision_feed_forward_length(shape.n_ff)
    writer.add_vision_block_count(shape.n_layer)
    writer.add_vision_head_count(shape.n_head)
    writer.add_vision_projection_dim(projector.mm_2.out_features)
    writer.add_vision_attention_layernorm_eps(shape.eps)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    if shape.projector == "mlp":
        writer.add_array("clip.vision.feature_layer", [shape.n_layer])  # else llama.cpp skips the last block
    for key, tensor in encoder.state_dict().items():
        key = key if key.endswith((".weight", ".bias")) else f"{key}.weight"
        _add(writer, f"v.{key}", tensor)
    if shape.projector == "qwen2vl_merger":  # of a second frame; a still picture counts as both
        _add(writer, "v.patch_embd.weight.1", torch.zeros_like(encoder.patch_embd.weight))
    for key, tensor in projector.state_dict().items():
        _add(writer, key.replace("mm_", "mm."), tensor)
    _finish(writer)
