"""The contract of a policy that was not tested here, tried on some small cases before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_csp.errors import EdgeCspError, PolicyError
from edge_csp.policy.base import MEASURED, BoolArray, IntArray, Observation, Policy, Span

N_MODALITY = 2
HEAD_DIM = 8


def check_policy(policy: Policy) -> None:
    """Select from small random caches; the same every time, and done in milliseconds.

    Count, protection, shape and type are checked by Policy.select() at every selection. Here also: the same arguments
    give the same cells, no input is changed, and a layer on its own gets the cells that it gets among others.

    Raises PolicyError that names the first offence.
    """
    for observation, budget, protected in _cases(policy):
        n_cell = observation.n_cell
        n_keep = policy.n_keep(budget, n_cell)
        if n_keep not in (min(budget, n_cell), n_cell):
            raise PolicyError(f"policy {policy.name}: n_keep({budget}, {n_cell}) is {n_keep}, not {budget} or {n_cell}")
        inputs: dict[str, npt.NDArray[Any]] = {"tag": observation.tag, "pos": observation.pos, "span": observation.span}
        inputs["offset"] = observation.offset
        inputs |= {name: getattr(observation, name) for name in policy.needs} | {"protected": protected}
        before = {name: array.copy() for name, array in inputs.items()}
        cells = policy.select(observation, budget, protected)
        for name, array in inputs.items():
            if not np.array_equal(array, before[name], equal_nan=array.dtype == np.float32):
                raise PolicyError(f"policy {policy.name} changes its input: {name}")
        _same(policy, "two calls with the same arguments", cells, policy.select(observation, budget, protected))
        for il in range(observation.shape[0]):
            alone = policy.select(observation.of_layer(il), budget, protected[il : il + 1])
            _same(policy, "a layer on its own and among others", cells[il : il + 1], alone, il)
        if policy.merges:
            _check_merge(policy, observation.of_layer(0), cells[0])


def _same(policy: Policy, what: str, cells: IntArray, others: IntArray, first_layer: int = 0) -> None:
    if (wrong := np.argwhere((cells != others).any(axis=-1))).size:
        il, head = wrong[0]
        raise PolicyError(
            f"policy {policy.name} broke its contract: {what} give different cells in layer {first_layer + il}, "
            f"head {head}"
        )


def _check_merge(policy: Policy, observation: Observation, cells: IntArray) -> None:
    """merge_rows() of one layer: shapes, types, no mutation, same result again."""
    k, v = np.random.default_rng(0).standard_normal((2, *observation.shape[1:], HEAD_DIM), np.float32)
    before = k.copy(), v.copy()
    results = []
    for array in (k, v):
        array.flags.writeable = False
    for _ in range(2):
        try:
            new_k, new_v = policy.merge_rows(observation, k, v, cells)
        except EdgeCspError:
            raise
        except Exception as error:
            raise PolicyError(f"policy {policy.name}: merge_rows failed: {type(error).__name__}: {error}") from error
        results.append((new_k, new_v))
    if not all(np.array_equal(array, copy) for array, copy in zip((k, v), before, strict=True)):
        raise PolicyError(f"policy {policy.name}: merge_rows changes its input")
    for name, first, second in zip("kv", *results, strict=True):
        if not isinstance(first, np.ndarray) or first.dtype != np.float32 or first.shape != k.shape:
            got = f"{first.dtype} {first.shape}" if isinstance(first, np.ndarray) else type(first).__name__
            raise PolicyError(f"policy {policy.name}: merge_rows gave {name} as {got}, not float32 {k.shape}")
        kept = np.take_along_axis(first, cells[..., None].astype(np.intp), axis=1)
        if not np.isfinite(kept).all() or not np.array_equal(first, second):
            raise PolicyError(
                f"policy {policy.name}: merge_rows gives {name} that is not finite, or differs every time"
            )


def _cases(policy: Policy) -> Iterator[tuple[Observation, int, BoolArray]]:
    """Caches with many equal values, with none at all, and with few cells; what the policy does not need is missing."""
    generator = np.random.default_rng(0)
    for shape, density, budget in (
        ((2, 2, 40), 1.0, 10),
        ((3, 1, 40), 0.3, 25),
        ((2, 3, 17), 0.0, 5),
        ((2, 2, 3), 0.5, 2),
        ((2, 1, 64), 1.0, 64),
        ((1, 2, 64), 0.5, 1),
    ):
        values: dict[str, Any] = {}
        for name in sorted(policy.needs):
            extra = (N_MODALITY,) if name == "scores" else ()
            size = (*shape[:2], *extra, shape[2], *((HEAD_DIM,) if MEASURED[name] > 3 and not extra else ()))
            drawn = generator.integers(0, 8, size).astype(np.float32) / 8
            values[name] = drawn * (generator.random(size) < density).astype(np.float32)
        tag = generator.integers(0, N_MODALITY, shape).astype(np.uint8)
        pos = np.sort(generator.integers(0, 4 * shape[2], shape).astype(np.int32), axis=-1)
        spans = [Span(16, is_picture=True, columns=4) if i % 2 else Span(16) for i in range(1 + int(pos.max()) // 16)]
        observation = Observation(tag, pos, span=pos // 16, offset=pos % 16, spans=spans, **values)
        protected = generator.random(shape) < 0.1
        protected[..., -1] = True
        if int(protected.sum(axis=-1).max()) > budget:
            protected[..., :-1] = False
        yield observation, budget, protected
