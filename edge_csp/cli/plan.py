"""`edge-csp plan`: what a conversation will take, before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from edge_csp.cli.options import ContextOptions, ModelOptions, grouped
from edge_csp.errors import EdgeCspError

if TYPE_CHECKING:
    from rich.table import Table

    from edge_csp.plan import Plan

BUDGET = "20%"
"""What is planned with beside the whole cache, if nothing else is given."""
_conversation = partial(Option, rich_help_panel="Conversation")
_context = partial(Option, rich_help_panel="Context")


@dataclass(frozen=True)
class ConversationOptions:
    images: Annotated[int, _conversation("--images", metavar="N", min=0, help="Pictures in it.")] = 0
    image_size: Annotated[
        str | None,
        _conversation("--image-size", metavar="WxH", help="Their size in pixels; by default what the encoder takes."),
    ] = None
    text_tokens: Annotated[
        int | None,
        _conversation(
            "--text-tokens", metavar="N", min=0, help="Its text; by default 512 tokens and 16 for every picture."
        ),
    ] = None
    budget: Annotated[
        str | None,
        _conversation(
            "--budget",
            metavar="SIZE",
            help="What stays of the KV cache: 20%, 512 (cells) or 64MiB; by default 20%, or what --cells holds.",
        ),
    ] = None


@dataclass(frozen=True)
class PlanContextOptions(ContextOptions):
    ctx_size: Annotated[
        int,
        _context(
            "-c",
            "--ctx-size",
            metavar="N",
            min=0,
            max=2**31 - 1,
            help="Cells of the whole KV cache; 0: what the conversation needs.",
        ),
    ] = 0
    cells: Annotated[
        str | None,
        _context(
            "--cells",
            metavar="SIZE",
            help="Size of a bounded cache; by default what stays of the budget, and a third more.",
        ),
    ] = None


@grouped
def command(
    conversation: ConversationOptions,
    model: ModelOptions,
    context: PlanContextOptions,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Tell what a conversation will take, before loading: cells, KV cache, weights, encoder, peak.

    Only the headers of the files are read; what is missing in memory shows here, not in the middle of a conversation.
    """
    from edge_csp.budget import parse_budget
    from edge_csp.cli.render import say, stdout
    from edge_csp.plan import make_plan

    budget = parse_budget(conversation.budget or context.cells or BUDGET)
    cells = parse_budget(context.cells) if context.cells else None
    size = parse_size(conversation.image_size) if conversation.image_size else None
    settings = context.settings()
    plan = make_plan(
        *model.paths(),
        budget=budget,
        n_image=conversation.images,
        image_size=size,
        n_text=conversation.text_tokens,
        n_ctx=settings.pop("n_ctx"),
        cells=cells,
        n_gpu_layers=model.gpu_layers,
        use_mmap=not model.no_mmap,
        rpc=model.rpc.split(",") if model.rpc else (),
        **{name: settings[name] for name in ("n_batch", "flash_attn", "type_k", "type_v")},
    )
    if as_json:
        print(json.dumps(plan_dict(plan), indent=1))
        return
    stdout().print(cells_table(plan))
    stdout().print()
    stdout().print(memory_table(plan))
    for note in plan.notes:
        say(note)


def parse_size(text: str) -> tuple[int, int]:
    """Read WxH."""
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", text.strip(), re.ASCII)
    if match is None:
        raise EdgeCspError(f"picture size {text[:32]!r} is not WxH, as in 640x480")
    return int(match[1]), int(match[2])


def cells_table(plan: Plan) -> Table:
    """Where the cells come from."""
    from edge_csp.cli.render import column_table, size

    table = column_table("", "each", "cells", "bytes")

    def add(name: str, each: str, n_cell: int) -> None:
        table.add_row(name, each, str(n_cell), size(n_cell * plan.bytes_per_cell))

    if picture := plan.picture:
        width, height = picture.size
        tiles = f", {picture.n_tile} tiles" if picture.n_tile > 1 else ""
        add(f"{plan.n_image} pictures of {width}x{height}{tiles}", str(picture.n_cell), plan.n_image * picture.n_cell)
        if picture.n_marker:
            add("tokens around them", str(picture.n_marker), plan.n_image * picture.n_marker)
    add("text", "", plan.n_text)
    add("the whole conversation", "", plan.n_cell)
    add("kept", "", plan.n_kept)
    return table


def memory_table(plan: Plan) -> Table:
    """What takes memory, with the whole cache and with a bounded one."""
    from edge_csp.cli.render import column_table, size

    whole, bounded = plan.whole, plan.bounded
    table = column_table("", f"-c {whole.n_ctx}", f"--cells {bounded.n_cell}")

    def add(name: str, in_whole: int, in_bounded: int) -> None:
        if in_whole or in_bounded:
            table.add_row(name, size(in_whole), size(in_bounded))

    def both(name: str, n_bytes: int) -> None:
        add(name, n_bytes, n_bytes)

    add("KV cache", whole.kv, bounded.kv)
    add("scratch of the graphs", whole.compute, bounded.compute)
    add("scratch of the kernels", whole.work, bounded.work)
    add("window", whole.ring, bounded.ring)
    add("scores, while evicting", whole.scores, bounded.scores)
    both(f"weights, {'mapped' if plan.mapped else 'read'}", plan.weights)
    both("weights, repacked for this CPU", plan.repacked)
    if not plan.encoder_on_device:
        both("encoder", plan.encoder)
        both("scratch of the encoder", plan.picture.scratch if plan.picture else 0)
    both("embeddings of the pictures", plan.embeddings)
    both("logits", plan.logits)
    add("peak", plan.peak(whole), plan.peak(bounded))
    add("on GPUs and RPC servers", plan.device(whole), plan.device(bounded))
    return table


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The plan for JSON."""
    result = {**asdict(plan), "model": str(plan.model), "mmproj": str(plan.mmproj) if plan.mmproj else None}
    for name, cache in (("whole", plan.whole), ("bounded", plan.bounded)):
        result[name] |= {"peak": plan.peak(cache), "device_peak": plan.device(cache)}
    return result
