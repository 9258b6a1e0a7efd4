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
  differently (TOLERANCE). The same steps with nothing removed tell whether they do; where not, bits are compared.
- scores: the rows of the graph's own softmax (`kq_soft_max-<il>`), summed over the queries of a modality and averaged
  over the query heads of a KV head.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

from edge_csp.errors import NativeError
from edge_csp.native import IMAGE, TEXT, Csp
from tests.native.cache import GraphTap
from tests.oracle.runtime import Runtime, log_tail, relative_error

BATCHES = [(TEXT, 40), (IMAGE, 20), (TEXT, 12)]  # tag and tokens of what is decoded before anything is removed
N_REST = 16  # tokens after that
N_WINDOW = 24  # queries, of both tags
UNSUPPORTED = -2
TOLERANCE = 2e-6  # ten times what sums in another order make of these models
PARTIAL_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

Array = npt.NDArray[np.float32]
Cells = npt.NDArray[np.int32]
State = ctypes.Array[ctypes.c_uint8]


class Wrong(Exception):
    """One line: what differs, and by how much."""


@dataclass(frozen=True)
class Outcome:
    model: str
    flash: bool
    memory: str  # class of llama.cpp's memory
    status: str  # pruned, refused, wrong or crashed
    reason: str = ""


def examine(path: Path, flash: bool, batches: Sequence[tuple[int, int]] = BATCHES) -> Outcome:
    memory = ""
    try:
        with open_model(path, flash) as runtime:
            memory = memory_class(runtime)
            reason = Examination(runtime, batches).refusal()
        if reason:
            return Outcome(path.stem, flash, memory, "refused", reason)
        with open_model(path, flash) as runtime:
            Examination(runtime, batches).check_keep()
        if not flash:
            tap = GraphTap("kq_soft_max")
            with open_model(path, flash, **tap.params) as runtime:
                Examination(runtime, batches).check_scores(tap)
    except (Wrong, NativeError, RuntimeError) as error:
        return Outcome(path.stem, flash, memory, "wrong", str(error).partition("\n")[0])
    return Outcome(path.stem, flash, memory, "pruned")


def open_model(path: Path, flash: bool, **context_params: object) -> Runtime:
    return Runtime(
        path, n_ctx=512, n_ubatch=128, flash_attn=flash, context_params={"swa_full": False, **context_params}
    )


def memory_class(runtime: Runtime) -> str:
    """The class of the memory object as its virtual table names it, without the prefix that all have."""
    memory = llama_cpp.llama_get_memory(runtime.ctx)
    if not memory:
        return "none"
    word = ctypes.sizeof(ctypes.c_void_p)
    read = ctypes.c_void_p.from_address
    type_info = read(read(memory).value - word).value
    return ctypes.string_at(read(type_info + word).value).decode().lstrip("0123456789").removeprefix("llama_")


class Examination:
    """The checks of one context."""

    def __init__(self, runtime: Runtime, batches: Sequence[tuple[int, int]]) -> None:
        self.runtime = runtime
        self.batches = batches
        self.n_past = sum(n for _, n in batches)
        generator = np.random.default_rng(1)
        self.tokens = generator.integers(0, 96, self.n_past + N_REST)
        self.all_cells = np.arange(self.n_past, dtype=np.int32)
        self.subset = np.sort(np.append(generator.permutation(self.n_past - 1)[:30], self.n_past - 1)).astype(np.int32)

    def past(self, csp: Csp | None = None) -> Array:
        """Logits of the past, decoded into an empty cache."""
        self.runtime.clear()
        return np.concatenate([self.batch(tag, n, csp) for tag, n in self.batches])

    def batch(self, tag: int, n: int, csp: Csp | None) -> Array:
        if csp is not None:
            csp.set_modality(tag)
        return self.runtime.decode(self.tokens[self.runtime.n_past : self.runtime.n_past + n])

    def rest(self) -> Array:
        """Logits of what follows: of a batch, then of single tokens."""
        tokens = self.tokens[self.n_past :]
        return np.concatenate([self.runtime.decode(part) for part in (tokens[:10], *tokens[10:, None])])

    def refusal(self) -> str:
        """The reason if csp refuses the model, after which it computes as before."""
        expected = self.past()
        check(np.isfinite(expected).all() and expected.std() > 0, "the model computes nothing")
        self.runtime.clear()
        try:
            Csp.attach(self.runtime.ctx).close()
            return ""
        except NativeError as error:
            check(error.status == UNSUPPORTED, f"attach fails with status {error.status}: {error}")
            reason = str(error).partition("cannot be pruned: ")[2]
            check(reason, f"refused without a reason: {error}")
            check_equal(self.past(), expected, "decode after the refusal")
            return reason

    def check_keep(self) -> None:
        full_past, full = self.past(), self.rest()
        noise = relative_error(self.removal(self.all_cells), full)
        tolerance = TOLERANCE if noise > 0 else 0.0
        check(noise <= tolerance, f"llama.cpp restores another state: {noise:.1e}")
        removed = self.removal(self.subset)
        self.runtime.clear()
        csp = Csp.attach(self.runtime.ctx, n_window=N_WINDOW)
        try:
            check_equal(self.past(csp), full_past, "recording")
            check_equal(self.rest(), full, "recording")
            self.past(csp)
            keep(csp, self.all_cells)
            check_equal(self.rest(), full, "keep of all cells")
            self.past(csp)
            keep(csp, self.subset)
            check_equal(self.rest(), removed, "keep of a subset", tolerance)
        finally:
            csp.close()
        lost = relative_error(full, removed)
        check(lost > 10 * tolerance, f"keep of a subset makes no difference: {lost:.1e}")

    def removal(self, cells: Cells) -> Array:
        """Logits of the rest after upstream's own removal of all positions but these, from the KV cache only."""
        self.past()
        partial = get_state(self.runtime, PARTIAL_ONLY)
        has_partial = len(partial) < len(get_state(self.runtime, 0))
        for begin, end in gaps(cells):
            check(self.runtime.remove(begin, end), f"llama_memory_seq_rm refuses positions {begin} .. {end - 1}")
        state = get_state(self.runtime, 0)
        self.runtime.clear()
        set_state(self.runtime, state, 0)
        if has_partial:
            set_state(self.runtime, partial, PARTIAL_ONLY)
        self.runtime.n_past = self.n_past
        return self.rest()

    def check_scores(self, tap: GraphTap) -> None:
        layers = cache_layers()
        csp = Csp.attach(self.runtime.ctx, n_window=N_WINDOW)
        try:
            info = csp.info()
            check(len(layers) == info.n_layer, f"{info.n_layer} layers, of the cache are {layers}")
            expected = np.zeros((info.n_layer, info.n_head_kv, info.n_modality, self.n_past), np.float32)
            for tag, n in self.batches:
                self.batch(tag, n, csp)
                n_vote = min(n, N_WINDOW - (self.n_past - self.runtime.n_past))
                if n_vote > 0:
                    rows = np.stack([tap.rows("kq_soft_max", il, info.n_head, n) for il in layers])
                    votes = rows[:, :, n - n_vote :, : self.n_past].sum(axis=2)
                    votes = votes.reshape(info.n_layer, info.n_head_kv, -1, votes.shape[-1]).mean(axis=2)
                    expected[:, :, tag, : votes.shape[-1]] += votes
            check_equal(csp.scores(N_WINDOW, 0.0), expected, "scores", 1e-5)
        finally:
            csp.close()


def keep(csp: Csp, cells: Cells) -> None:
    info = csp.info()
    csp.keep(np.broadcast_to(cells, (info.n_layer, info.n_head_kv, len(cells))))


def gaps(cells: Cells) -> Iterator[tuple[int, int]]:
    for before, after in zip([-1, *cells[:-1]], cells, strict=True):
        if before + 1 < after:
            yield int(before) + 1, int(after)


def get_state(runtime: Runtime, flags: int) -> State:
    data = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size_ext(runtime.ctx, 0, flags))()
    written = llama_cpp.llama_state_seq_get_data_ext(runtime.ctx, data, len(data), 0, flags)
    check(written == len(data), "llama.cpp does not save its state")
    return data


def set_state(runtime: Runtime, data: State, flags: int) -> None:
    read = llama_cpp.llama_state_seq_set_data_ext(runtime.ctx, data, len(data), 0, flags)
    check(read == len(data), "llama.cpp does not restore its state")


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
