"""`edge-csp run`: one question, one answer."""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_csp.cli.options import (
    ContextOptions,
    ModelOptions,
    PromptOptions,
    PruningOptions,
    SamplingOptions,
    clean,
    grouped,
    opened,
)
from edge_csp.errors import EdgeCspError

if TYPE_CHECKING:
    from edge_csp.images import Picture
    from edge_csp.session import Session


@grouped
def command(
    prompt: PromptOptions,
    model: ModelOptions,
    context: ContextOptions,
    pruning: PruningOptions,
    sampling: SamplingOptions,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the answer.")] = False,
) -> None:
    """Ask once, about the pictures given; the answer goes to stdout."""
    text = prompt_text(prompt.prompt)
    from edge_csp.cli.render import Bars, notes, say
    from edge_csp.images import load_picture

    if sampling.seed == -1:
        sampling = replace(sampling, seed=secrets.randbelow(2**32 - 1))  # so that it can be told
    pictures = [load_picture(path) for path in prompt.image]
    for picture in pictures:
        notes(picture)
    bars = Bars()
    try:
        parts = [{"type": "image", "picture": picture} for picture in pictures]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        settings = model, context, pruning, sampling, prompt
        with opened(*settings, cells_of=[question], on_progress=bars) as session:
            if session.template.notice:
                say(session.template.notice)
            result = _ask(session, text, pictures, prompt.predict, stream=not as_json)
    finally:
        bars.close()
    if as_json:
        result |= {"policy": pruning.policy, "seed": sampling.seed}
        print(json.dumps(result, indent=1))


def prompt_text(given: str | None) -> str:
    """What to ask, from -p or from stdin."""
    if given is None and sys.stdin.isatty():
        raise EdgeCspError("no prompt: give one with -p, or on stdin")
    text = sys.stdin.read().rstrip("\n") if given in (None, "-") else clean(str(given))
    if not text:
        raise EdgeCspError("the prompt is empty")
    return text


def _ask(session: Session, text: str, pictures: list[Picture], n_predict: int, *, stream: bool) -> dict[str, Any]:
    """Ask and, if wanted, print the answer as it comes; returns the JSON object."""
    from edge_csp.cli.render import cache_line, kept_line, say, times_dict, use_dict, write

    answer = ""
    for piece in session.ask(text, pictures, n_predict=n_predict):
        answer += piece
        if stream:
            write(piece)
    if stream:
        write("\n")
    say(kept_line(session))
    mmproj, pruning = session.model.mmproj_info, session.pruning
    return {
        "answer": answer,
        "finish_reason": session.finish_reason,
        **use_dict(session.cache_use()),
        "budget": str(pruning.budget) if pruning.budget else None,
        "cells_max": session.n_cell_max,
        "cache": cache_line(session),
        "evicted": session.counters.n_evicted,
        "reread": session.counters.n_reread,
        "times": times_dict(session.counters),
        "model": str(session.model.info.path),
        "mmproj": str(mmproj.path) if mmproj else None,
    }
