"""Write the two GGUF files: text (``llama`` architecture) and vision (``clip`` architecture, projector ``mlp``)."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from torch import Tensor, nn

from edge_csp.demo.scenes import IMAGE_SIZE

from . import MMPROJ_FILE, NAME, TEXT_FILE, language, vision
from .albums import tokenizer
from .chat import BOS, END, PAD, TEMPLATE


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices as float16, vectors and position embeddings as float32."""
    half = tensor.ndim > 1 and "position" not in name
    writer.add_tensor(name, tensor.detach().float().numpy().astype(np.float16 if half else np.float32))


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter) -> None:
    """What both files have in common, so that a frontend can tell that they belong together."""
    writer.add_name(NAME)
    writer.add_basename(NAME)
    writer.add_description("A tiny vision-language model for demonstrations and tests; see MODEL_CARD.md")
    writer.add_license("mit")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def export_text(model: nn.Module, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer)
    writer.add_context_length(language.CONTEXT)
    writer.add_embedding_length(language.N_EMBD)
    writer.add_block_count(language.N_LAYER)
    writer.add_feed_forward_length(language.N_FF)
    writer.add_head_count(language.N_HEAD)
    writer.add_head_count_kv(language.N_HEAD_KV)
    writer.add_key_length(language.HEAD_DIM)
    writer.add_value_length(language.HEAD_DIM)
    writer.add_layer_norm_rms_eps(language.RMS_EPS)
    writer.add_rope_dimension_count(language.HEAD_DIM)
    writer.add_rope_freq_base(language.ROPE_BASE)
    tok = tokenizer()
    writer.add_vocab_size(len(tok))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")  # whole pieces are looked up before any merge
    writer.add_token_list(tok.tokens)
    kinds = [gguf.TokenType.CONTROL if tok.is_control(i) else gguf.TokenType.NORMAL for i in range(len(tok))]
    writer.add_token_types(kinds)
    writer.add_token_merges(["1 0"])  # the key has to exist; no two pieces are ever merged
    writer.add_bos_token_id(tok.id[BOS])
    writer.add_eos_token_id(tok.id[END])
    writer.add_eot_token_id(tok.id[END])
    writer.add_pad_token_id(tok.id[PAD])
    writer.add_add_bos_token(False)  # the template writes it
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        _add(writer, name, tensor)
    _finish(writer)


def export_mmproj(encoder: nn.Module, projector: nn.Module, path: Path) -> None:
    writer = gguf.GGUFWriter(path, "clip")
    _describe(writer)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(IMAGE_SIZE)
    writer.add_vision_patch_size(vision.PATCH)
    writer.add_vision_embedding_length(vision.N_EMBD)
    writer.add_vision_feed_forward_length(vision.N_FF)
    writer.add_vision_block_count(vision.N_LAYER)
    writer.add_vision_head_count(vision.N_HEAD)
    writer.add_vision_projection_dim(language.N_EMBD)
    writer.add_vision_attention_layernorm_eps(vision.EPS)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    writer.add_array("clip.vision.feature_layer", [vision.N_LAYER])  # else llama.cpp skips the last block
    for name, tensor in encoder.state_dict().items():
        name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        _add(writer, f"v.{name}", tensor)
    for name, tensor in projector.state_dict().items():
        _add(writer, name.replace("mm_", "mm."), tensor)
    _finish(writer)


def export(model: nn.Module, encoder: nn.Module, projector: nn.Module, out: Path) -> tuple[Path, Path]:
    """Write both files into the folder ``out`` and return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    text, mmproj = out / TEXT_FILE, out / MMPROJ_FILE
    export_text(model, text)
    export_mmproj(encoder, projector, mmproj)
    return text, mmproj
