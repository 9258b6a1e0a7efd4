"""Tiny vision encoders with random weights, one for every way in which libmtmd counts the cells of a picture."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

PATCH = 8


def make_mmproj(
    path: Path,
    projector: str,
    *,
    n_out: int = 128,
    n_layer: int = 2,
    n_embd: int = 64,
    n_ff: int = 256,
    image_size: int = 64,
) -> Path:
    """Write an encoder and return its path.

    projector: mlp (LLaVA), idefics3 (tiles of image_size, an overview, longest side 2*image_size), internvl (the same,
               at most 12 tiles), gemma3 (a fixed size, pooled), qwen2vl_merger or pixtral (any size)
    n_out:     values per picture cell, n_embd of the text model
    """
    random = np.random.default_rng(0)
    n_patch = (image_size // PATCH) ** 2
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_size(image_size)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(n_embd)
    writer.add_vision_feed_forward_length(n_ff)
    writer.add_vision_block_count(n_layer)
    writer.add_vision_head_count(4)
    writer.add_vision_projection_dim(n_out)
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean([0.5, 0.5, 0.5])
    writer.add_vision_image_std([0.5, 0.5, 0.5])
    if projector == "mlp":
        writer.add_array("clip.vision.feature_layer", [n_layer])
    if projector in ("idefics3", "internvl", "gemma3"):
        writer.add_uint32("clip.vision.projector.scale_factor", 2)
    if projector == "idefics3":
        writer.add_uint32("clip.vision.preproc_image_size", 2 * image_size)

    patches = n_embd, 3, PATCH, PATCH
    shapes: dict[str, tuple[int, ...]] = {"v.patch_embd.weight": patches, "v.post_ln.weight": (n_embd,)}
    if projector == "qwen2vl_merger":
        shapes["v.patch_embd.weight.1"] = patches
    elif projector != "pixtral":
        n_class = 1 if projector == "internvl" else 0
        shapes |= {"v.patch_embd.bias": (n_embd,), "v.position_embd.weight": (n_patch + n_class, n_embd)}
        shapes |= {"v.class_embd": (n_embd,)} if n_class else {}
    for il in range(n_layer):
        matrices = {f"attn_{name}": (n_embd, n_embd) for name in ("q", "k", "v", "out")}
        matrices |= {"ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
        matrices |= {"ffn_gate": (n_ff, n_embd)} if projector == "pixtral" else {}
        for name, shape in matrices.items():
            shapes |= {f"v.blk.{il}.{name}.weight": shape, f"v.blk.{il}.{name}.bias": shape[:1]}
        shapes |= {f"v.blk.{il}.{name}.{kind}": (n_embd,) for name in ("ln1", "ln2") for kind in ("weight", "bias")}
    shapes |= {
        "mlp": {"mm.0.weight": (n_out, n_embd), "mm.0.bias": (n_out,), "mm.2.weight": (n_out, n_out)}
        | {"mm.2.bias": (n_out,)},
        "idefics3": {"mm.model.fc.weight": (n_out, 4 * n_embd)},
        "gemma3": {"mm.input_projection.weight": (n_embd, n_out), "mm.soft_emb_norm.weight": (n_embd,)},
        "internvl": {"mm.model.mlp.0.weight": (4 * n_embd,), "mm.model.mlp.0.bias": (4 * n_embd,)}
        | {"mm.model.mlp.1.weight": (n_out, 4 * n_embd), "mm.model.mlp.1.bias": (n_out,)}
        | {"mm.model.mlp.3.weight": (n_out, n_out), "mm.model.mlp.3.bias": (n_out,)},
        "qwen2vl_merger": {"mm.0.weight": (4 * n_embd, 4 * n_embd), "mm.0.bias": (4 * n_embd,)}
        | {"mm.2.weight": (n_out, 4 * n_embd), "mm.2.bias": (n_out,)},
        "pixtral": {"mm.1.weight": (n_out, n_embd), "mm.2.weight": (n_out, n_out)}
        | {"v.token_embd.img_break": (n_out,)},
    }[projector]
    for name, shape in shapes.items():
        half = len(shape) > 1 and "position" not in name
        values = 0.1 * random.standard_normal(shape)
        writer.add_tensor(name, values.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
