"""What the tests of `edge-csp bench quality` share."""

from __future__ import annotations

from typing import Any

from edge_csp import VisionModel
from edge_csp.bench.quality.albums import Album
from edge_csp.bench.quality.protocols import PROTOCOLS, Plan, measure
from edge_csp.bench.quality.reading import Record, open_context
from edge_csp.bench.quality.specs import parse_spec
from edge_csp.budget import parse_budget

N_PREDICT = 12


def measured(model: VisionModel, album: Album, *policies: str, **what: Any) -> list[Record]:
    chosen = [parse_spec(text) for text in policies]
    budgets = [parse_budget(text) for text in what.get("budgets", ["20%"])]
    plan = Plan(chosen, budgets, what.get("protocols", PROTOCOLS), N_PREDICT, lambda *_key: True)
    with open_context(model, album, chosen, N_PREDICT) as context:
        return list(measure(context, album, plan))


def answers(found: list[Record], protocol: str) -> list[str]:
    return [record.answer for record in found if record.protocol == protocol]
