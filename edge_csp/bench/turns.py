"""Later turns: the conversation goes on, or everything is evaluated again; pictures are known, or encoded."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_csp.bench.alternate import Times
from edge_csp.bench.decode import filled
from edge_csp.bench.process import RemoteCache, Workers
from edge_csp.bench.runtime import N_UBATCH, Setting
from edge_csp.budget import Budget

N_NEW = 64
"""Tokens of a later turn."""
N_PICTURE = 8


@dataclass(frozen=True)
class Turns:
    """Milliseconds to the first token of a turn of N_NEW tokens after n_cell, n_keep of them left.

    going_on: the new tokens are evaluated after the kept cells; again: the whole conversation is, without pruning.
    """

    n_cell: int
    n_keep: int
    going_on: Times
    again: Times

    @property
    def share(self) -> float:
        """Time of going on in that of evaluating all again."""
        return self.going_on.median / self.again.median


def measure_turns(workers: Workers, n_cell: int, budget: Budget, *, cell_bytes: int, n_repeat: int) -> Turns:
    n_keep = budget.cells(n_cell, cell_bytes)
    going_on, again = [], []
    for _ in range(n_repeat):
        kept = RemoteCache(workers.ours, n_cell + N_NEW, Setting(), records=True)
        whole = RemoteCache(workers.plain, n_cell + N_NEW, Setting())
        try:
            filled(kept, n_cell).evict(n_keep)
            going_on.append(kept.decode(N_NEW))
            batches = range(0, n_cell + N_NEW, N_UBATCH)
            again.append(sum(whole.decode(min(N_UBATCH, n_cell + N_NEW - begin)) for begin in batches))
        finally:
            kept.close()
            whole.close()
    return Turns(n_cell, n_keep, Times(tuple(going_on)), Times(tuple(again)))


@dataclass(frozen=True)
class PictureTurns:
    """Milliseconds to the first token of an answer about n_picture pictures, in a session; encoder runs of each.

    first: the pictures are new. second: a further question. again: the same pictures in a new conversation.
    """

    n_picture: int
    n_cell: int
    first: Times
    second: Times
    again: Times
    n_encoded: tuple[int, int, int]


def measure_picture_turns(
    model: Path, mmproj: Path | None, budget: Budget, *, n_thread: int, n_gpu_layers: int, n_repeat: int
) -> PictureTurns:
    """Random pictures, other ones in every repetition. Raises EdgeCspError if the model cannot read pictures."""
    from PIL import Image

    from edge_csp.images import Picture, load_picture
    from edge_csp.opening import open_session
    from edge_csp.sampling import Sampling
    from edge_csp.session import Session

    def pictures(side: int) -> list[Picture]:
        random = np.random.default_rng(list(os.urandom(16)))
        shape = (side, side, 3)
        images = [Image.fromarray(random.integers(0, 256, shape, np.uint8)) for _ in range(N_PICTURE)]
        return [load_picture(image, name=f"random {i + 1}") for i, image in enumerate(images)]

    def ask(session: Session, text: str, given: Sequence[Picture] = ()) -> tuple[float, int]:
        """Milliseconds to the first token, encoder runs."""
        n_encoded, begin = session.model.n_encoded, time.perf_counter()
        stream = session.ask(text, given, n_predict=1)
        for _ in stream:
            break
        ms = 1000 * (time.perf_counter() - begin)
        stream.close()
        return ms, session.model.n_encoded - n_encoded

    settings: dict[str, Any] = {"n_threads": n_thread, "n_gpu_layers": n_gpu_layers, "n_ctx": 8192}
    found = []
    with open_session(model, mmproj, budget=budget.text, sampling=Sampling(temperature=0), **settings) as session:
        info = session.model.mmproj_info
        side = min(info.image_size or 336, 1024) if info else 336
        for _ in range(n_repeat):
            session.clear()
            given = pictures(side)
            first = ask(session, "What is in these pictures?", given)
            n_cell = session.n_token
            second = ask(session, "And what else?")
            session.clear()
            found.append((first, second, ask(session, "What is in these pictures?", given)))
    first_ms, second_ms, again_ms = (Times(tuple(turns[i][0] for turns in found)) for i in range(3))
    last = found[-1]
    return PictureTurns(N_PICTURE, n_cell, first_ms, second_ms, again_ms, (last[0][1], last[1][1], last[2][1]))
