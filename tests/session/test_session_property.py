"""Any conversation, in caches that are bounded, budgeted or plain: the session knows what its cache holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_csp import Pruning, Session, VisionModel, make_policy, parse_budget
from edge_csp.errors import BudgetError, ContextError
from edge_csp.native import IMAGE, TEXT
from tests.session.test_bounded import Watched
from tests.session.test_session import GREEDY, ask, picture

N_CTX = 512
COMMON = ("ask", "ask with evictions", "too long", "undo", "clear", "other budget", "pin", "rehearsed")
BUDGETS = st.none() | st.sampled_from(["20%", "60%", "100"])
NUMBERS = st.integers(0, 1000)


class Conversations(RuleBasedStateMachine):
    def __init__(self, context: Watched, done: Counter[str]) -> None:
        super().__init__()
        self.context, self.done = context, done
        self.context.clear()
        self.context.most = 0

    @initialize(
        policy=st.sampled_from(["blend", "blend+", "full"]),
        cells=st.none() | st.integers(80, N_CTX),
        budget=BUDGETS,
        has_system=st.booleans(),
        reread=st.sampled_from([0, 1e-4]),
    )
    def open(self, policy: str, cells: int | None, budget: str | None, has_system: bool, reread: float) -> None:
        self.evicts = policy != "full"
        self.policy, self.cells, self.reread = make_policy(policy), cells if self.evicts else None, reread
        pruning = self.pruning(budget)
        system = "Be short." if has_system else None
        self.session = Session(self.context, pruning=pruning, sampling=GREEDY, system=system)
        self.is_pinned = False

    def pruning(self, budget: str | None) -> Pruning:
        parsed = parse_budget(budget) if budget else None
        return Pruning(parsed, self.policy, self.cells, min_cells=16, reread=self.reread)

    def teardown(self) -> None:
        self.done["example"] += 1

    @rule(
        seeds=st.lists(st.integers(0, 7), max_size=4),
        n_word=st.sampled_from([0, 0, 0, 20, 200]),
        n_predict=st.integers(0, 8),
    )
    def ask(self, seeds: list[int], n_word: int, n_predict: int) -> None:
        before = list(self.session.messages)
        text = "What is in picture 1?" + " word" * n_word
        try:
            ask(self.session, text, *map(picture, seeds), n_predict=n_predict)
        except ContextError:
            assert not self.evicts
            assert self.session.messages == before
            self.done["too long"] += 1
            return
        except BudgetError:
            assert self.is_pinned
            assert self.session.messages == before
            self.done["pinned too much"] += 1
            return
        assert [message["role"] for message in self.session.messages[len(before) :]] == ["user", "assistant"]
        assert [use.name for use in self.session.cache_use().pictures] == [
            part["picture"].name for part in self.picture_parts()
        ]
        self.done["rehearsed"] += self.session.counters.n_rehearsed > 0
        self.done["reread"] += self.session.counters.n_reread > 0
        self.done["ask with evictions" if self.session.counters.n_evicted else "ask"] += 1

    def picture_parts(self) -> list[dict[str, Any]]:
        contents = [m["content"] for m in self.session.messages if not isinstance(m["content"], str)]
        return [part for content in contents for part in content if part["type"] == "image"]

    @rule(n_word=st.integers(1, 100), n_predict=st.integers(0, 40))
    def chat(self, n_word: int, n_predict: int) -> None:
        self.ask([], n_word, n_predict)

    @precondition(lambda self: self.session.messages)
    @rule()
    def undo(self) -> None:
        n_before = len(self.session.messages)
        n_system = n_before % 2  # questions and answers come in pairs
        assert self.session.undo() == (n_before > n_system)
        assert len(self.session.messages) == max(n_system, n_before - 2)
        self.done["undo"] += 1

    @precondition(lambda self: len(self.session.messages) > 1)
    @rule()
    def clear(self) -> None:
        self.session.clear()
        assert (self.session.n_token, self.context.n_cell) == (0, 0)
        self.is_pinned = False
        self.done["clear"] += 1

    @precondition(lambda self: self.session.messages)
    @rule(budget=BUDGETS)
    def other_budget(self, budget: str | None) -> None:
        self.session.pruning = self.pruning(budget)
        self.done["other budget"] += 1

    @precondition(lambda self: self.picture_parts())
    @rule(number=NUMBERS, pinned=st.booleans())
    def pin_picture(self, number: int, pinned: bool) -> None:
        self.session.pin_picture(1 + number % len(self.picture_parts()), pinned=pinned)
        self.is_pinned |= pinned
        self.done["pin"] += 1

    @precondition(lambda self: any(m["role"] == "user" for m in self.session.messages))
    @rule(number=NUMBERS, pinned=st.booleans())
    def pin_turn(self, number: int, pinned: bool) -> None:
        n_turn = sum(message["role"] == "user" for message in self.session.messages)
        self.session.pin_turn(1 + number % n_turn, pinned=pinned)
        self.is_pinned |= pinned
        self.done["pin"] += 1

    @invariant()
    def knows_its_cells(self) -> None:
        session, use = self.session, self.session.cache_use()
        items = session._items
        assert self.context.n_past == sum(item.n_pos for item in items)
        assert session.n_token == use.n_token == sum(item.n_cell for item in items)
        assert use.n_cell == self.context.n_cell <= min(session.n_cell_max, use.n_token)
        assert self.context.most <= (self.cells or N_CTX)
        assert use.n_text + sum(p.n_cell for p in use.pictures) == use.n_token
        assert use.text_kept + sum(p.kept for p in use.pictures) == pytest.approx(use.n_cell)
        assert -1e-6 <= use.text_kept <= use.n_text + 1e-6
        assert all(0 <= p.kept <= p.n_cell for p in use.pictures)
        assert all(item.part is None for item in items)  # pixels are let go
        if session.counters.n_eviction == 0:
            assert use.n_cell == use.n_token
        modality = np.repeat(
            [IMAGE if i.is_picture else TEXT for i in items] or [TEXT], [i.n_pos for i in items] or [0]
        )
        pos, tag = self.context.cells()
        assert np.array_equal(tag, modality[pos] if pos.size else tag)
        assert (pos[..., -1:] == self.context.n_past - 1).all()


@pytest.fixture(scope="module")
def context(demo_files: tuple[Path, Path]) -> Iterator[Watched]:
    with VisionModel(*demo_files, n_threads=1) as model, Watched(model, n_ctx=N_CTX) as opened:
        yield opened


def test_conversations(context: Watched) -> None:
    done: Counter[str] = Counter()
    profile = settings(stateful_step_count=15, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(lambda: Conversations(context, done), settings=profile)
    print(dict(done))
    assert done["example"] >= profile.max_examples
    assert all(done[name] > 0 for name in COMMON), done
