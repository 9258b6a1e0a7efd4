"""Any sequence of what a conversation does to its cache, on several models: every logit, every count, every position.

A state machine decodes, sends pictures, evicts, makes room, undoes, saves, restores, clears, and does what has to be
refused. The same happens to a NumpyCache, which computes in numpy what each token gives with the cells that were kept
when it came. After every step the two must agree. HYPOTHESIS_PROFILE=long runs many more examples, at random.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from edge_csp.errors import NativeError
from edge_csp.native import IMAGE, MODALITY_AUTO, TEXT, Csp
from edge_csp.policy import CspPolicy, Observation
from tests.native.cache import Bytes, restore_sequence, sequence_state
from tests.native.test_keep import random_cells
from tests.native.test_sequences import decode as decode_several
from tests.native.test_state import with_int
from tests.oracle.numpy_cache import NumpyCache
from tests.oracle.numpy_llama import NumpyLlama
from tests.oracle.random_models import make_model
from tests.oracle.runtime import Runtime, relative_error
from tests.oracle.test_numpy_llama import TOLERANCE, TOLERANCE_FLASH

TOLERANCE_DEEP_FLASH = TOLERANCE_FLASH * 256**0.5 / 10  # that one is for 100 cells; what is summed in f16 here: 256
TOLERANCE_Q8_0 = 2e-2  # a value that rounds the other way is off by 1/127 of the largest of its block
N_LAYER, N_WINDOW, N_MODALITY, N_CELL_MAX, N_UBATCH = 2, 24, 3, 256, 16


@dataclass(frozen=True)
class Case:
    arch: str = "llama"
    n_head_kv: int = 2
    head_dim: int = 32
    cache: str = "f32"
    flash: bool = False
    device: str = "cpu"
    n_seq: int = 1

    @property
    def tolerance(self) -> float:
        """Of logits."""
        if self.cache == "q8_0":
            return TOLERANCE_Q8_0
        return TOLERANCE_DEEP_FLASH if self.flash else TOLERANCE[self.cache]

    @property
    def tolerance_scores(self) -> float:
        """Of scores, whose exponential widens what is wrong with a query: relative to the largest score."""
        return max(2e-2, self.tolerance) if self.flash else self.tolerance


CASES = {
    "mha": Case(n_head_kv=4, head_dim=16),
    "gqa": Case(),
    "mrope": Case("qwen2vl", head_dim=16),
    "mha-f16": Case(n_head_kv=4, head_dim=16, cache="f16"),
    "mrope-f16-flash": Case("qwen2vl", cache="f16", flash=True),
    "gqa-q8_0-flash": Case(cache="q8_0", flash=True),
    "gqa-rpc": Case(device="rpc"),
    "gqa-sequences": Case(n_seq=2),
    "mrope-sequences": Case("qwen2vl", cache="f16", flash=True, n_seq=2),
}


@dataclass
class Bench:
    """A model that is open in llama.cpp and in numpy, and what has been done with it."""

    case: Case
    runtime: Runtime
    oracle: NumpyLlama
    done: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0


@dataclass(frozen=True, eq=False)
class Saved:
    sequence: Bytes
    sidecar: bytes
    cache: NumpyCache


SEEDS = st.integers(0, 2**16)
TAGS = st.integers(MODALITY_AUTO, N_MODALITY - 1)
COMMON = (
    *("evaluate", "evaluate after evict", "overflow", "keep", "keep all", "keep by scores", "make room"),
    *("undo", "cut into kept cells", "clear", "save", "restore", "restore damaged"),
)
DAMAGES = ("cut", "longer", "magic", "layers", "heads", "cells", "kept", "kept less", "tag", "position")


def damaged(state: bytes, how: str) -> bytes:
    """Bytes that do not fit the cache that `state` is of."""
    n_layer, n_head_kv, n_cell, n_kept = np.frombuffer(state[8:24], np.int32).tolist()
    if how == "position" and n_kept == 0:
        how = "magic"
    return {
        "cut": lambda: state[:-1],
        "longer": lambda: state + b"\0",
        "magic": lambda: b"x" + state[1:],
        "layers": lambda: with_int(state, 0, n_layer + 1),
        "heads": lambda: with_int(state, 1, n_head_kv - 1),
        "cells": lambda: with_int(state, 2, n_cell + 1),
        "kept": lambda: with_int(state, 3, n_cell + 1),
        "kept less": lambda: with_int(state, 3, n_kept - 1),
        "tag": lambda: state[:-1] + bytes([N_MODALITY]),
        "position": lambda: with_int(state, 4, -1),
    }[how]()


class Sequences(RuleBasedStateMachine):
    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self.bench, self.runtime, self.done = bench, bench.runtime, bench.done
        self.runtime.clear()
        self.csp = Csp.attach(self.runtime.ctx, n_window=N_WINDOW, n_modality=N_MODALITY)
        self.seq_id = 0  # the one that the rules are about
        self.caches = {seq_id: NumpyCache.empty(bench.oracle) for seq_id in range(bench.case.n_seq)}
        self.saves: list[Saved] = []

    def teardown(self) -> None:
        self.csp.close()
        self.done["example"] += 1

    @property
    def cache(self) -> NumpyCache:
        return self.caches[self.seq_id]

    @cache.setter
    def cache(self, cache: NumpyCache) -> None:
        self.caches[self.seq_id] = cache

    @property
    def memory(self) -> Any:
        return llama_cpp.llama_get_memory(self.runtime.ctx)

    @property
    def n_free(self) -> int:
        return N_CELL_MAX - self.cache.n_cell

    @precondition(lambda self: len(self.caches) > 1)
    @rule()
    def other_sequence(self) -> None:
        self.seq_id = (self.seq_id + 1) % len(self.caches)

    @precondition(lambda self: len(self.caches) > 1)
    @rule(counts=st.lists(st.integers(1, 30), min_size=2, max_size=2), seed=SEEDS, tag=TAGS)
    def all_sequences_in_one_batch(self, counts: list[int], seed: int, tag: int) -> None:
        draw, tokens = np.random.default_rng(seed), {}
        for (seq_id, cache), n in zip(self.caches.items(), counts, strict=True):
            self.csp.set_modality(tag, seq_id=seq_id)
            tokens[seq_id] = draw.integers(0, self.runtime.n_vocab, min(n, N_CELL_MAX - cache.n_cell))
        begin = {seq_id: cache.n_past for seq_id, cache in self.caches.items()}
        tokens = {seq_id: part for seq_id, part in tokens.items() if len(part)}
        if tokens:
            for seq_id, logits in decode_several(self.runtime, tokens, begin).items():
                self.compare_tokens(seq_id, logits, tokens[seq_id], tag)

    # --- evaluate ---

    def evaluate(self, n: int, seed: int, tag: int) -> None:
        """N tokens, as many as there is room for."""
        if (n := min(n, self.n_free)) < 1:
            return
        tokens = np.random.default_rng(seed).integers(0, self.runtime.n_vocab, n)
        self.runtime.n_past = self.cache.n_past
        self.csp.set_modality(tag, seq_id=self.seq_id)
        logits = self.runtime.decode(tokens, seq_id=self.seq_id)
        self.compare_tokens(self.seq_id, logits, tokens, tag)

    def compare(self, seq_id: int, logits: npt.NDArray[np.float32], embd: Any, positions: Any, tag: int) -> None:
        """One batch of a sequence: what it is in numpy, with the cells of now."""
        cache = self.caches[seq_id]
        self.caches[seq_id], expected = cache.evaluate(
            self.bench.oracle, embd, positions, tag, N_WINDOW, self.bench.case.cache
        )
        self.check_close(logits, expected, self.bench.case.tolerance)
        self.done["evaluate after evict" if cache.n_kept else "evaluate"] += 1

    def compare_tokens(self, seq_id: int, logits: npt.NDArray[np.float32], tokens: Any, tag: int) -> None:
        positions = self.caches[seq_id].n_past + np.arange(len(tokens))
        self.compare(seq_id, logits, self.bench.oracle.embed(tokens), positions, TEXT if tag == MODALITY_AUTO else tag)

    def check_close(self, actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32], tolerance: float) -> None:
        error = relative_error(actual, expected)
        self.bench.worst = max(self.bench.worst, error / tolerance)
        assert error <= tolerance

    @rule(n=st.integers(1, 60), cut=st.integers(0, 60), seed=SEEDS, tag=TAGS)
    def prefill(self, n: int, cut: int, seed: int, tag: int) -> None:
        """One batch or two, of several ubatches."""
        self.evaluate(min(cut, n), seed, tag)
        self.evaluate(n - cut, seed + 1, tag)

    @rule(seed=SEEDS, tag=TAGS)
    def decode(self, seed: int, tag: int) -> None:
        self.evaluate(1, seed, tag)

    @rule(
        n_row=st.integers(1, 5),
        n_column=st.integers(1, 6),
        cut=st.integers(0, 30),
        n_keep=st.none() | SEEDS,
        seed=SEEDS,
    )
    def picture(self, n_row: int, n_column: int, cut: int, n_keep: int | None, seed: int) -> None:
        """Embeddings, in one batch or in two with an eviction between them; with M-RoPE on a grid."""
        n_column = min(n_column, self.n_free)
        n = n_column and n_column * min(n_row, self.n_free // n_column)
        embd = np.random.default_rng(seed).standard_normal((n, self.bench.oracle.n_embd), np.float32)
        positions = self.cache.n_past + np.arange(n)
        if self.bench.oracle.rope_sections:
            start = self.cache.n_past
            y, x = np.divmod(np.arange(n), max(n_column, 1))
            positions = np.stack([np.full(n, start), start + y, start + x, 0 * x])
        self.csp.set_modality(MODALITY_AUTO, seq_id=self.seq_id)
        for part in (slice(0, cut), slice(cut, n)):
            if len(embd[part]):
                logits = self.runtime.decode(embd=embd[part], positions=positions[..., part], seq_id=self.seq_id)
                self.compare(self.seq_id, logits, embd[part], positions[..., part], IMAGE)
            if part.start == 0 and n_keep is not None and self.cache.n_cell:
                self.evict(n_keep, seed)

    @precondition(lambda self: self.cache.n_cell > 0 and self.seq_id == 0)  # see test_a_full_stream_gets_no_hole
    @rule(n=st.integers(1, 20))
    def overflow(self, n: int) -> None:
        self.runtime.n_past = self.cache.n_past
        with self.nothing_changes(), pytest.raises(RuntimeError, match="llama_decode returned 1"):
            self.runtime.decode(np.zeros(min(self.n_free + n, N_CELL_MAX)), seq_id=self.seq_id)
        self.done["overflow"] += 1

    # --- evict ---

    def keep(self, cells: npt.NDArray[np.int32]) -> None:
        self.csp.keep(cells, seq_id=self.seq_id)
        self.done["keep" if cells.shape[-1] < self.cache.n_cell else "keep all"] += 1
        self.cache = self.cache.keep(cells)

    @precondition(lambda self: self.cache.n_cell > 0)
    @rule(n_keep=SEEDS, seed=SEEDS)
    def evict(self, n_keep: int, seed: int) -> None:
        self.keep(random_cells(self.csp, 1 + n_keep % self.cache.n_cell, seed, self.seq_id))

    @precondition(lambda self: self.cache.window)
    @rule(
        budget=SEEDS,
        ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
        n_recent=st.integers(1, 20),
        n_sink=st.integers(0, 4),
        n_pin=st.integers(0, 4),
        n_obs=st.integers(1, N_WINDOW),
        seed=SEEDS,
    )
    def evict_by_scores(
        self, budget: int, ratio: float, n_recent: int, n_sink: int, n_pin: int, n_obs: int, seed: int
    ) -> None:
        """The CSP rule. The library and the policy in Python take the same cells."""
        n_cell = self.cache.n_cell
        budget = 1 + budget % n_cell
        n_recent = min(n_recent, budget)
        n_sink = min(n_sink, budget - n_recent)
        n_pin = min(n_pin, budget - n_recent - n_sink)
        pinned = np.zeros(self.cache.pos.shape, np.bool_)
        for row in np.ndindex(*pinned.shape[:2]):
            pinned[row][np.random.default_rng((seed, *row)).integers(0, n_cell, n_pin)] = True
        pinned[..., n_cell - n_recent - 1] = False  # the policy would take it for a recent one
        protected = pinned.copy()
        protected[..., :n_sink] = protected[..., n_cell - n_recent :] = True

        scores = self.csp.scores(n_obs, seq_id=self.seq_id)
        expected = self.cache.scores(n_obs, 1.0, N_MODALITY)
        self.check_close(scores, expected, self.bench.case.tolerance_scores)
        policy = CspPolicy(ratio, pool=1)
        k_self, k_cross = policy.shares(budget - n_recent)
        shares = {"k_self": k_self, "k_cross": k_cross, "n_recent": n_recent, "n_sink": n_sink}
        cells = self.csp.select(scores, pinned=pinned, seq_id=self.seq_id, **shares)
        pos, tag = self.csp.cells(seq_id=self.seq_id)
        assert np.array_equal(cells, policy.select(Observation(tag, pos, scores=scores), budget, protected))
        self.keep(cells)
        self.done["keep by scores"] += 1

    @precondition(lambda self: self.n_free > 0)
    @rule(n_free=st.integers(0, 3), seed=SEEDS)
    def fill(self, n_free: int, seed: int) -> None:
        """Until the cache is nearly full."""
        self.evaluate(self.n_free - n_free, seed, MODALITY_AUTO)

    @rule(n=st.integers(1, 100), n_batch=st.integers(20, 60), n_keep=st.integers(0, 150), seed=SEEDS)
    def make_room(self, n: int, n_batch: int, n_keep: int, seed: int) -> None:
        """A prompt that is longer than what is free, in batches that evict first where they would not fit."""
        n += self.n_free
        while n > 0:
            n_batch = min(n, n_batch)
            if n_batch > self.n_free:
                self.done["make room"] += 1
                if self.cache.window:
                    self.evict_by_scores(n_keep, 0.5, 8, 2, 0, N_WINDOW, seed)
                else:
                    self.evict(n_keep, seed)
            self.evaluate(n_batch, seed + n, MODALITY_AUTO)
            n -= n_batch

    # --- undo ---

    def remove(self, begin: int, end: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, self.seq_id, begin, end))

    @precondition(lambda self: self.cache.removable())
    @rule(n=SEEDS)
    def undo(self, n: int) -> None:
        behind = self.cache.removable()
        begin = behind[-1 - n % len(behind)]
        assert self.remove(begin, -1)
        self.cache = self.cache.remove(begin)
        self.done["undo"] += 1

    @precondition(lambda self: self.cache.n_kept > 0)
    @rule(begin=SEEDS, end=st.integers(-1, 2**16))
    def cut_into_kept_cells(self, begin: int, end: int) -> None:
        last_kept, last = self.cache.pos[0, 0, [self.cache.n_kept - 1, -1]].tolist()
        begin %= last_kept + 1
        if end >= 0 or begin == 0:
            end = begin + 1 + end % (last - begin + 1)
            if begin == 0 and end > last:
                return  # that is all
        with self.nothing_changes():
            assert not self.remove(begin, end)
            assert not llama_cpp.llama_memory_can_shift(self.memory)
            llama_cpp.llama_memory_seq_add(self.memory, self.seq_id, begin, end, 3)
            llama_cpp.llama_memory_seq_div(self.memory, self.seq_id, begin, end, 2)
        self.done["cut into kept cells"] += 1

    @precondition(lambda self: self.cache.n_cell > 0)
    @rule(how=st.sampled_from(["clear", "-1", "0"]))
    def clear(self, how: str) -> None:
        if how == "clear":
            self.runtime.clear()
            self.caches = dict.fromkeys(self.caches, NumpyCache.empty(self.bench.oracle))
        else:
            assert self.remove(int(how), -1)
            self.cache = NumpyCache.empty(self.bench.oracle)
        self.done["clear"] += 1

    # --- save and restore ---

    @precondition(lambda self: self.cache.n_cell > 0 and len(self.saves) < 3)
    @rule()
    def save(self) -> None:
        self.saves.append(
            Saved(sequence_state(self.runtime, self.seq_id), self.csp.state(seq_id=self.seq_id), self.cache)
        )
        self.done["save"] += 1

    @precondition(lambda self: self.saves)
    @rule(n=SEEDS, is_cleared=st.booleans(), damage=st.none() | st.sampled_from(DAMAGES))
    def restore(self, n: int, is_cleared: bool, damage: str | None) -> None:
        saved = self.saves[-1 - n % len(self.saves)]
        if is_cleared:
            self.clear("0")
        restore_sequence(self.runtime, saved.sequence, self.seq_id)
        if damage:
            self.check_refused(damaged(saved.sidecar, damage))
        self.csp.set_state(saved.sidecar, seq_id=self.seq_id)
        assert self.csp.state(seq_id=self.seq_id) == saved.sidecar
        self.cache = saved.cache.restored()
        self.done["restore"] += 1

    @precondition(lambda self: self.cache.n_cell > 0)
    @rule(damage=st.sampled_from(DAMAGES))
    def restore_damaged(self, damage: str) -> None:
        with self.nothing_changes():
            self.check_refused(damaged(self.csp.state(seq_id=self.seq_id), damage))
        self.done["restore damaged"] += 1

    def check_refused(self, sidecar: bytes) -> None:
        before = self.csp.state(seq_id=self.seq_id)
        with pytest.raises(NativeError):
            self.csp.set_state(sidecar, seq_id=self.seq_id)
        assert self.csp.state(seq_id=self.seq_id) == before

    # --- what always holds ---

    @contextmanager
    def nothing_changes(self) -> Iterator[None]:
        before = self.observed()
        yield
        assert self.observed() == before

    def observed(self) -> list[Any]:
        return [
            (
                bytes(self.csp.info(seq_id=seq_id)),
                self.csp.state(seq_id=seq_id),
                sequence_state(self.runtime, seq_id).tobytes(),
                self.csp.scores(N_WINDOW, seq_id=seq_id).tobytes() if cache.window else b"",
            )
            for seq_id, cache in self.caches.items()
        ]

    @invariant()
    def agrees(self) -> None:
        for seq_id, cache in self.caches.items():
            self.check_agreement(seq_id, cache)

    def check_agreement(self, seq_id: int, cache: NumpyCache) -> None:
        info = self.csp.info(seq_id=seq_id)
        assert (info.n_cell, info.n_kept, info.n_cell_max) == (cache.n_cell, cache.n_kept, N_CELL_MAX)
        assert info.n_window == len(cache.window)
        pos, tag = self.csp.cells(seq_id=seq_id)
        assert np.array_equal(pos, cache.pos)
        assert np.array_equal(tag, cache.tag)
        assert (np.diff(pos, axis=-1) >= 0).all()
        last = llama_cpp.llama_memory_seq_pos_max(self.memory, seq_id)
        assert (pos[..., -1:] == last).all()
        assert last < cache.n_past or (last, cache.n_past) == (-1, 0)
        if cache.window:
            mass = self.csp.scores(N_WINDOW, 0.0, seq_id=seq_id).sum(axis=(2, 3))
            np.testing.assert_allclose(mass, len(cache.window), rtol=1e-5)  # every query gives away a mass of 1


@pytest.fixture(scope="module", params=CASES)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    case = CASES[request.param]
    shape = {"n_layer": N_LAYER, "n_head_kv": case.n_head_kv, "head_dim": case.head_dim}
    path = make_model(tmp_path_factory.mktemp("sequences") / f"{request.param}.gguf", case.arch, **shape)
    open_model = request.getfixturevalue("on_server") if case.device == "rpc" else Runtime
    cache = {"type_k": case.cache, "type_v": case.cache, "flash_attn": case.flash}
    if case.n_seq > 1:
        cache |= {"kv_unified": False, "context_params": {"n_seq_max": case.n_seq}}
    with open_model(path, n_ctx=case.n_seq * N_CELL_MAX, n_ubatch=N_UBATCH, **cache) as runtime:
        yield Bench(case, runtime, NumpyLlama(path))


def n_examples() -> int:
    """Of every case: 60, more in other profiles."""
    return settings().max_examples * 6 // 10


def test_sequences(bench: Bench, request: pytest.FixtureRequest) -> None:
    profile = settings(max_examples=n_examples(), stateful_step_count=20, suppress_health_check=list(HealthCheck))

    def machine() -> Sequences:
        return Sequences(bench)

    if profile.derandomize:
        machine = seed(zlib.crc32(request.node.name.encode()))(machine)  # other examples on every model
    run_state_machine_as_test(machine, settings=profile)
    print(f"{request.node.name}: {dict(bench.done)}, largest error {bench.worst:.2f} of what is tolerated")
    assert bench.done["example"] >= profile.max_examples
    _done[request.node.name] = bench.done


_done: dict[str, Counter[str]] = {}


def test_enough_examples_of_everything() -> None:
    """Which examples there are depends on hypothesis, so what is rare need not happen in every case."""
    assert len(CASES) * n_examples() >= 500
    if len(_done) == len(CASES):
        steps = sum(_done.values(), Counter())
        assert all(steps[name] > 0 for name in COMMON), steps


@pytest.mark.xfail(reason="llama_kv_cache::prepare() restores the head of stream 1 from that of stream 0", strict=True)
def test_a_full_stream_gets_no_hole(tmp_path: Path) -> None:
    """A batch that does not fit leaves its stream as it was: the next token goes into the next cell."""
    settings = {"kv_unified": False, "context_params": {"n_seq_max": 2}}
    with Runtime(make_model(tmp_path / "model.gguf", "llama", n_layer=2), n_ctx=2 * N_CELL_MAX, **settings) as runtime:
        csp = Csp.attach(runtime.ctx)
        decode_several(runtime, {0: np.arange(2), 1: np.arange(1)}, {0: 0, 1: 0})
        runtime.n_past = 1
        with pytest.raises(RuntimeError, match="llama_decode returned 1"):
            runtime.decode(np.zeros(N_CELL_MAX), seq_id=1)
        runtime.decode([0], seq_id=1)
        try:
            assert csp.cells(seq_id=1)[0].shape == (2, 2, 2)
        finally:
            csp.close()
