"""A sequence that can be put back to an earlier state, and answers from it beside those of the full cache.

Answers are greedy: the likeliest token every time.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.context import Context
from edge_csp.errors import BenchError, NativeError
from edge_csp.policy.base import IntArray

Floats = NDArray[np.float64]
Predictions = NDArray[np.float32]
N_PREDICTED = 32
"""Tokens that are evaluated at once where something is expected after each: logits of large vocabularies are large."""


@dataclass(frozen=True)
class State:
    """Cells of a sequence, pruned or not: llama.cpp's bytes and ours. The observation window is not in it."""

    cells: NDArray[np.uint8]
    tags: bytes
    n_past: int


def save(context: Context) -> State:
    import llama_cpp

    assert context.csp
    cells = np.empty(llama_cpp.llama_state_seq_get_size(context.handle, context.seq_id), np.uint8)
    n = llama_cpp.llama_state_seq_get_data(context.handle, _pointer(cells), cells.size, context.seq_id)
    if n != cells.size:
        raise NativeError(f"the state of a sequence cannot be saved: {native.last_log_error()}")
    return State(cells, context.csp.state(seq_id=context.seq_id), context.n_past)


def restore(context: Context, state: State) -> None:
    import llama_cpp

    assert context.csp
    n = llama_cpp.llama_state_seq_set_data(context.handle, _pointer(state.cells), state.cells.size, context.seq_id)
    if n != state.cells.size:
        raise NativeError(f"the state of a sequence cannot be restored: {native.last_log_error()}")
    context.csp.set_state(state.tags, seq_id=context.seq_id)
    context.n_past = state.n_past


def _pointer(data: NDArray[np.uint8]) -> ctypes._Pointer[ctypes.c_uint8]:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def rewind(context: Context, n_past: int) -> None:
    """Forget what was evaluated from position n_past on. Raises BenchError if the cache cannot do that."""
    if not context.truncate(n_past):
        raise BenchError(
            f"{context.model.info.path}: its cache takes nothing back (recurrent layers, say), so answers to several "
            "questions cannot be compared"
        )


def decode(context: Context, tokens: tuple[int, ...]) -> Floats:
    """Evaluate text; log-probabilities of the next token, f64 [n_vocab]."""
    for begin in range(0, len(tokens), context.n_batch):
        context.decode_tokens(tokens[begin : begin + context.n_batch])
    return log_probs(context)


def log_probs(context: Context) -> Floats:
    """Of the token after the last one that was evaluated, f64 [n_vocab]."""
    import llama_cpp

    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context.handle, -1), (context.model.n_vocab,))
    x = logits.astype(np.float64)
    x -= x.max()
    shifted: Floats = x - np.log(np.exp(x).sum())
    return shifted


def kl(p: Floats, q: Floats) -> float:
    """KL divergence of log-probabilities, KL(p || q) in nats."""
    return max(0.0, float((np.exp(p) * (p - q)).sum()))


def predictions(context: Context, tokens: tuple[int, ...]) -> Predictions:
    """Evaluate text; log-probabilities after each of its tokens, f32 [n_token, n_vocab]. The text is taken back."""
    n_past = context.n_past
    found = np.empty((len(tokens), context.model.n_vocab), np.float32)
    for begin in range(0, len(tokens), N_PREDICTED):
        some = tokens[begin : begin + N_PREDICTED]
        rows = found[begin : begin + len(some)]
        rows[:] = _logits(context, some)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    rewind(context, n_past)
    return found


def _logits(context: Context, tokens: tuple[int, ...]) -> Predictions:
    """Evaluate text as Context.decode_tokens() does, with the logits after every token, f32 [n_token, n_vocab]."""
    import llama_cpp

    context.decode_tokens(tokens, all_logits=True)
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context.handle), (len(tokens), context.model.n_vocab))
    return found.copy()


def kl_rows(p: Predictions, q: Predictions) -> Floats:
    """KL divergence of every row of log-probabilities, KL(p || q) in nats, f64 [n]."""
    rows = [kl(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(p, q, strict=True)]
    return np.array(rows)


@dataclass(frozen=True)
class Reference:
    """An answer of the full cache. tokens: with the one that ended it. log_probs: before each, f64 [n_vocab]."""

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[Floats, ...]


@dataclass(frozen=True)
class Answer:
    """kl: from the full cache, mean over the tokens of its answer. same: exactly these tokens."""

    text: str
    same: bool
    kl: float


def reference(context: Context, first: Floats, n_predict: int) -> Reference:
    """Answer from the cache as it is; `first`: log-probabilities after the question. The answer is taken back."""
    n_past = context.n_past
    found = [first]
    tokens = [int(first.argmax())]
    while not context.model.is_end(tokens[-1]) and len(tokens) < n_predict:
        found.append(decode(context, (tokens[-1],)))
        tokens.append(int(found[-1].argmax()))
    rewind(context, n_past)
    return Reference(_text(context, tokens), tuple(tokens), tuple(found))


def answer(context: Context, first: Floats, full: Reference, n_predict: int) -> Answer:
    """Like reference(), compared with it: the same tokens are evaluated, up to the first that differs for the answer
    and all of them for the divergence.
    """
    n_past, divergence, n_same, now = context.n_past, 0.0, len(full.tokens), first
    own: int | None = None
    for i, (token, expected) in enumerate(zip(full.tokens, full.log_probs, strict=True)):
        if i:
            now = decode(context, (full.tokens[i - 1],))
        divergence += kl(expected, now)
        likeliest = int(now.argmax())
        if own is None and likeliest != token:
            own, n_same = likeliest, i
    mean = divergence / len(full.tokens)
    if own is None:
        rewind(context, n_past)
        return Answer(full.text, True, mean)
    rewind(context, n_past + n_same)
    tokens = [*full.tokens[:n_same], own]
    while not context.model.is_end(tokens[-1]) and len(tokens) < n_predict:
        tokens.append(int(decode(context, (tokens[-1],)).argmax()))
    rewind(context, n_past)
    return Answer(_text(context, tokens), False, mean)


def _text(context: Context, tokens: list[int]) -> str:
    model = context.model
    data = b"".join(model.token_bytes(token) for token in tokens if not model.is_end(token))
    return data.decode("utf-8", "replace").strip()


@dataclass(frozen=True)
class Kept:
    """Cells that stay, mean over layers and KV heads."""

    text: float
    picture: float


def kept(tags: NDArray[np.uint8], cells: IntArray | None = None) -> Kept:
    """Of tags u8 [n_layer, n_head_kv, n_cell], those at `cells` i32 [n_layer, n_head_kv, n_keep]."""
    chosen = tags if cells is None else np.take_along_axis(tags, cells.astype(np.intp), axis=2)
    n_picture = float((chosen != native.TEXT).sum()) / (chosen.shape[0] * chosen.shape[1])
    return Kept(chosen.shape[2] - n_picture, n_picture)
