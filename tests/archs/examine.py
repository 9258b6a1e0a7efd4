"""What csp does with a model: prune it correctly, or refuse it with a reason.

    python -m tests.archs.examine MODEL:FLASH…

prints a line of JSON for every model file and flash attention (0 or 1) as soon as it is known: where llama.cpp aborts,
it ends this process only.

What a pruned model is compared with, always on a context that never had a csp:

- recording, and keep of all cells: the same decodes, bit for bit.
- the same cells kept in every layer and head: llama_memory_seq_rm of all others. Saving and restoring the sequence then
  closes the holes, so that the cells lie where keep puts them and even the order of sums is the same. seq_rm also
  empties sliding windows, which a csp leaves alone: what llama.cpp calls partial state (windows and recurrent states)
  is saved before the removal and restored last. Restored windows lie elsewhere; without flash attention that rounds
  differently. How much is measured by the same steps with nothing removed: usually zero, and then bits are compared.
- scores: the rows of the graph's own softmax (`kq_soft_max-<il>`), summed over the queries of a modality and averaged
  over the query heads of a KV head.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_csp.errors import NativeError
from edge_csp.native import IMAGE, TEXT, Csp
from tests.native.cache import GraphTap
from tests.oracle.runtime import Runtime, log_tail, relative_error

BATCHES = [(TEXT, 40), (IMAGE, 20), (TEXT, 12)]  # the past: tag and tokens of every batch
N_PAST = sum(n for _, n in BATCHES)
N_KEEP = 30
N_WINDOW = 24  # both tags
TOKENS = np.random.default_rng(1).integers(0, 96, N_PAST + 16)
ALL_CELLS = np.arange(N_PAST, dtype=np.int32)
UNSUPPORTED = -2
PARTIAL_ONLY = 1

Array = npt.NDArray[np.float32]


class Wrong(Exception):
    """One line: what differs, and by how much."""


@dataclass(frozen=True)
class Outcome:
    model: str
    flash: bool
    memory: str  # class of llama.cpp's memory
    status: str  # pruned, refused, wrong or crashed
    reason: str = ""


def examine(path: Path, flash: bool) -> Outcome:
    memory = ""
    try:
        with open_model(path, flash) as runtime:
            memory = memory_class(runtime)
            reason = check_refusal(runtime)
            if reason:
                return Outcome(path.stem, flash, memory, "refused", reason)
        check_keep(path, flash)
        if not flash:
            check_scores(path)
        return Outcome(path.stem, flash, memory, "pruned")
    except (Wrong, NativeError, RuntimeError) as error:
        return Outcome(path.stem, flash, memory, "wrong", str(error).partition("\n")[0])


def open_model(path: Path, flash: bool, **context_params: object) -> Runtime:
    runtime = Runtime(path, n_ubatch=128, flash_attn=flash, context_params={"swa_full": False, **context_params})
    if llama_cpp.llama_model_has_encoder(runtime.model):
        tokens = (ctypes.c_int32 * 8)(*TOKENS[:8])
        if llama_cpp.llama_encode(runtime.ctx, llama_cpp.llama_batch_get_one(tokens, 8)) != 0:
            raise RuntimeError(f"llama_encode failed\n{log_tail()}")
    return runtime


def memory_class(runtime: Runtime) -> str:
    """The class of the memory object as its virtual table names it, without the prefix that all have."""
    memory = llama_cpp.llama_get_memory(runtime.ctx)
    if not memory:
        return "none"
    word = ctypes.sizeof(ctypes.c_void_p)
    read = ctypes.c_void_p.from_address
    type_info = read(read(memory).value - word).value
    return ctypes.string_at(read(type_info + word).value).decode().lstrip("0123456789").removeprefix("llama_")


def past(runtime: Runtime, csp: Csp | None = None) -> Array:
    """Decode the past from an empty cache."""
    runtime.clear()
    logits = []
    for tag, n in BATCHES:
        if csp is not None:
            csp.set_modality(tag)
        logits.append(runtime.decode(TOKENS[runtime.n_past : runtime.n_past + n]))
    return np.concatenate(logits)


def rest(runtime: Runtime) -> Array:
    """Decode what follows: a batch, then single tokens."""
    batches = [TOKENS[N_PAST : N_PAST + 10], *TOKENS[N_PAST + 10 :, None]]
    return np.concatenate([runtime.decode(tokens) for tokens in batches])


def check_refusal(runtime: Runtime) -> str:
    """The reason if csp refuses the model, after which it computes as before."""
    expected = past(runtime)
    check(np.isfinite(expected).all() and expected.std() > 0, "the model computes nothing")
    runtime.clear()
    try:
        Csp.attach(runtime.ctx).close()
        return ""
    except NativeError as error:
        check(error.status == UNSUPPORTED, f"attach fails with status {error.status}: {error}")
        check_equal(past(runtime), expected, "decode after the refusal")
        reason = str(error).partition("cannot be pruned: ")[2]
        check(bool(reason), f"refused without a reason: {error}")
        return reason


def check_keep(path: Path, flash: bool) -> None:
    generator = np.random.default_rng(2)
    subset = np.append(np.sort(generator.permutation(N_PAST - 1)[: N_KEEP - 1]), N_PAST - 1).astype(np.int32)
    with open_model(path, flash) as runtime:
        full_past, full = past(runtime), rest(runtime)
        noise = relative_error(removal(runtime, ALL_CELLS), full)
        check(noise <= 1e-6, f"llama.cpp restores another state: {noise:.1e}")
        removed = removal(runtime, subset)

        runtime.clear()
        csp = Csp.attach(runtime.ctx, n_window=N_WINDOW)
        try:
            check_equal(past(runtime, csp), full_past, "recording")
            check_equal(rest(runtime), full, "recording")
            past(runtime, csp)
            keep(csp, ALL_CELLS)
            check_equal(rest(runtime), full, "keep of all cells")
            past(runtime, csp)
            keep(csp, subset)
            check_equal(rest(runtime), removed, "keep of a subset", 10 * noise)
        finally:
            csp.close()
    lost = relative_error(full, removed)
    check(lost > 100 * noise, f"keep of a subset makes no difference: {lost:.1e}")


def keep(csp: Csp, cells: npt.NDArray[np.int32]) -> None:
    info = csp.info()
    csp.keep(np.broadcast_to(cells, (info.n_layer, info.n_head_kv, len(cells))))


def removal(runtime: Runtime, cells: npt.NDArray[np.int32]) -> Array:
    """Logits of the rest after upstream's own removal of all positions but these, from the KV cache only."""
    past(runtime)
    partial = get_state(runtime, PARTIAL_ONLY)
    has_partial = len(partial) < len(get_state(runtime, 0))
    for begin, end in gaps(cells):
        check(runtime.remove(begin, end), f"llama_memory_seq_rm refuses positions {begin} .. {end - 1}")
    state = get_state(runtime, 0)
    runtime.clear()
    set_state(runtime, state, 0)
    if has_partial:
        set_state(runtime, partial, PARTIAL_ONLY)
    runtime.n_past = N_PAST
    return rest(runtime)


def get_state(runtime: Runtime, flags: int) -> ctypes.Array[ctypes.c_uint8]:
    data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size_ext(runtime.ctx, 0, flags))()
    written = llama_cpp.llama_state_seq_get_data_ext(runtime.ctx, data, len(data), 0, flags)
    check(written == len(data), "llama.cpp does not save its state")
    return data


def set_state(runtime: Runtime, data: ctypes.Array[ctypes.c_uint8], flags: int) -> None:
    read = llama_cpp.llama_state_seq_set_data_ext(runtime.ctx, data, len(data), 0, flags)
    check(read == len(data), "llama.cpp does not restore its state")


def gaps(cells: npt.NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    for before, after in zip([-1, *cells[:-1]], cells, strict=True):
        if before + 1 < after:
            yield int(before) + 1, int(after)


def check_scores(path: Path) -> None:
    tap = GraphTap("kq_soft_max")
    with open_model(path, False, **tap.params) as runtime:
        layers = cache_layers()
        csp = Csp.attach(runtime.ctx, n_window=N_WINDOW)
        try:
            info = csp.info()
            check(len(layers) == info.n_layer, f"{info.n_layer} layers, of the cache are {layers}")
            expected = np.zeros((info.n_layer, info.n_head_kv, info.n_modality, N_PAST), np.float32)
            for tag, n in BATCHES:
                csp.set_modality(tag)
                runtime.decode(TOKENS[runtime.n_past : runtime.n_past + n])
                n_vote = min(n, N_WINDOW - (N_PAST - runtime.n_past))
                if n_vote > 0:
                    rows = np.stack([tap.rows("kq_soft_max", il, info.n_head, n) for il in layers])
                    votes = rows[:, :, n - n_vote :, :N_PAST].sum(axis=2)
                    votes = votes.reshape(info.n_layer, info.n_head_kv, -1, votes.shape[-1]).mean(axis=2)
                    expected[:, :, tag, : votes.shape[-1]] += votes
            scores = csp.scores(N_WINDOW, 0.0)
        finally:
            csp.close()
    check_equal(scores, expected, "scores", 1e-5)


def cache_layers() -> list[int]:
    """Layers of the first KV cache of the last context (the one without windows), as llama.cpp logs them."""
    first = re.split("creating +SWA KV cache", log_tail(10_000).rpartition("constructing llama_context")[2])[0]
    return [int(il) for il in re.findall(r"llama_kv_cache: layer +(\d+): dev", first)]


def check(is_true: object, message: str) -> None:
    if not is_true:
        raise Wrong(message)


def check_equal(actual: Array, expected: Array, what: str, tolerance: float = 0.0) -> None:
    error = relative_error(actual, expected)
    check(error <= tolerance, f"{what}: {error:.1e} from what it should be")


def main() -> int:
    for argument in sys.argv[1:]:
        path, flash = argument.rsplit(":", 1)
        print(json.dumps(asdict(examine(Path(path), flash == "1"))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
