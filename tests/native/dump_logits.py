"""Decode one sequence under many settings and save the logits. Needs llama_cpp and numpy only, of any version.

    python dump_logits.py OUT_FOLDER MODEL.gguf…

Writes OUT_FOLDER/{stem of the model}-{cache}-{flash}-{n_ubatch}.npy, f32 [n_token, n_vocab].
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path

import llama_cpp
import numpy as np

CACHES = {"f16": (1, 1), "q8_0": (8, 8), "q8_0+f16": (8, 1)}  # types of K and V
# a quantised V cache needs flash attention
SETTINGS = [("f16", 0), ("f16", 1), ("q8_0+f16", 0), ("q8_0", 1)]
UBATCHES = (16, 64)
N_PROMPT, N_SINGLE, N_PICTURE, N_VOCAB = 50, 10, 20, 96


@llama_cpp.llama_log_callback
def _silent(level, text, user_data):  # type: ignore[no-untyped-def]
    pass


def decode(ctx, n_past, tokens=None, embd=None, positions=None):  # type: ignore[no-untyped-def]
    """Logits of all tokens; embeddings with positions [4, n] for M-RoPE."""
    n = len(tokens if embd is None else embd)
    pos = np.ascontiguousarray(np.arange(n_past, n_past + n) if positions is None else positions, np.int32)
    batch = llama_cpp.llama_batch()
    batch.n_tokens = n
    if embd is None:
        batch.token = (ctypes.c_int32 * n)(*tokens.tolist())
    else:
        batch.embd = embd.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    batch.pos = pos.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
    batch.n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
    batch.seq_id = (ctypes.POINTER(ctypes.c_int32) * n)(*[(ctypes.c_int32 * 1)(0)] * n)
    batch.logits = (ctypes.c_int8 * n)(*[1] * n)
    if llama_cpp.llama_decode(ctx, batch) != 0:
        raise SystemExit("llama_decode failed")
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(ctx), shape=(n, N_VOCAB)).copy()


def run(model, cache, flash, n_ubatch, is_mrope):  # type: ignore[no-untyped-def]
    """A prompt, a picture, single tokens."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = 256
    params.n_ubatch = n_ubatch
    params.n_threads = params.n_threads_batch = 1
    params.type_k, params.type_v = CACHES[cache]
    params.flash_attn_type = flash
    ctx = llama_cpp.llama_init_from_model(model, params)
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, N_VOCAB, N_PROMPT + N_SINGLE)
    picture = generator.standard_normal((N_PICTURE, llama_cpp.llama_model_n_embd(model)), np.float32)
    logits = [decode(ctx, 0, tokens[:N_PROMPT])]
    y, x = np.divmod(np.arange(N_PICTURE), 5)
    grid = np.stack([np.full(N_PICTURE, N_PROMPT), N_PROMPT + y, N_PROMPT + x, 0 * x]) if is_mrope else None
    logits.append(decode(ctx, N_PROMPT, embd=picture, positions=grid))
    start = N_PROMPT + (5 if is_mrope else N_PICTURE)
    logits += [decode(ctx, start + i, token[None]) for i, token in enumerate(tokens[N_PROMPT:])]
    llama_cpp.llama_free(ctx)
    return np.concatenate(logits)


def main() -> None:
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    folder = Path(sys.argv[1])
    for path in map(Path, sys.argv[2:]):
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        is_mrope = llama_cpp.llama_model_rope_type(model) == llama_cpp.LLAMA_ROPE_TYPE_MROPE
        for (cache, flash), n_ubatch in itertools.product(SETTINGS, UBATCHES):
            logits = run(model, cache, flash, n_ubatch, is_mrope)
            np.save(folder / f"{path.stem}-{cache}-{flash}-{n_ubatch}.npy", logits)
        llama_cpp.llama_model_free(model)


if __name__ == "__main__":
    main()
