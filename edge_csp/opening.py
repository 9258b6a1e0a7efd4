"""Open a model and a conversation with it in one go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_csp.budget import MIN_CELLS, Budget, parse_budget
from edge_csp.chat import ChatTemplate, Message, message_pictures
from edge_csp.context import CELL_PAD, Context, bytes_per_cell
from edge_csp.embeddings import EmbeddingCache
from edge_csp.errors import ContextError, NativeError
from edge_csp.items import items_of
from edge_csp.model import Progress, VisionModel
from edge_csp.native import UNSUPPORTED
from edge_csp.policy import Policy, make_policy
from edge_csp.pruning import Pruning
from edge_csp.sampling import Sampling
from edge_csp.session import Session


@contextmanager
def open_session(
    model: str | Path,
    mmproj: str | Path | None = None,
    *,
    budget: str | Budget | None = None,
    policy: str | Policy = "blend",
    cells: str | Budget | None = None,
    cells_of: Sequence[Message] = (),
    pruning: Pruning | None = None,
    sampling: Sampling | None = None,
    system: str | None = None,
    past_trained: str = "continue",
    n_gpu_layers: int = -1,
    n_threads: int | None = None,
    use_mmap: bool = True,
    rpc: Sequence[str] = (),
    embedding_cache: EmbeddingCache | None = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
    **context: Any,
) -> Iterator[Session]:
    """Open a model and a conversation with it; both are closed at the end of the `with` block.

    model, mmproj: GGUF files, see VisionModel. budget: "20%", 512 cells as "512", "64MiB", or None to keep what fits.
    policy: a Policy, or a name as for make_policy(). cells: the cache has so many cells or bytes, or a share of the
    prompt `cells_of`, instead of n_ctx cells. In either case it holds any conversation, unless the model's cache cannot
    be pruned: without budget and cells such a model runs unpruned, which on_notice is called with. pruning: all other
    pruning settings at once, instead of budget and policy.
    context: further settings of Context (n_ctx, n_batch, type_k, type_v, flash_attn …).

    Raises EdgeCspError with one line that tells what is wrong with the files or the settings.
    """
    if pruning is None:
        pruning = Pruning(
            parse_budget(budget) if isinstance(budget, str) else budget,
            make_policy(policy) if isinstance(policy, str) else policy,
        )
    with ExitStack() as stack:
        opened = stack.enter_context(
            VisionModel(
                model,
                mmproj,
                n_gpu_layers=n_gpu_layers,
                n_threads=n_threads,
                use_mmap=use_mmap,
                rpc=rpc,
                embedding_cache=embedding_cache,
                on_progress=on_progress,
            )
        )
        if cells is not None:
            bound = parse_budget(cells) if isinstance(cells, str) else cells
            n_cell = bounded_cells(bound, opened, cells_of, **context)
            pruning, context["n_ctx"] = replace(pruning, cells=n_cell), n_cell
        session = Session(
            stack.enter_context(_open_context(opened, pruning, on_notice, context)),
            pruning=pruning,
            sampling=sampling,
            system=system,
            past_trained=past_trained,
            on_progress=on_progress,
            on_notice=on_notice,
        )
        yield session


def _open_context(
    model: VisionModel, pruning: Pruning, on_notice: Callable[[str], None] | None, settings: dict[str, Any]
) -> Context:
    """One that can be pruned, or, if nothing asks for that and the model's cache cannot be, a plain one."""
    try:
        return Context(model, n_window=pruning.n_obs, **settings)
    except NativeError as error:
        wants = pruning.budget is not None or pruning.cells is not None or bool(settings.get("softmax_n"))
        if error.status != UNSUPPORTED or wants:
            raise
        if on_notice:
            on_notice(f"{error}: it runs unpruned, and a conversation ends when the context is full")
    return Context(model, **{**settings, "prune": False})


def bounded_cells(bound: Budget, model: VisionModel, prompt: Sequence[Message], **context: Any) -> int:
    """Cells of a cache that is bounded to cells, bytes or a share of a prompt.

    Raises ContextError for a share of nothing, and below MIN_CELLS.
    """
    n_prompt = 0
    if bound.kind == "ratio":
        if not prompt:
            raise ContextError(
                f"a cache of {bound} has no prompt yet to be a share of: give cells (512) or bytes (64MiB)"
            )
        info = model.info
        text = ChatTemplate(info.chat_template, info.bos_token, info.eos_token).render(prompt)
        pictures = message_pictures(prompt)
        n_prompt = sum(item.n_cell for item in items_of(model.tokenize(text, pictures)))
    types = {name: context[name] for name in ("type_k", "type_v") if name in context}
    n_cell = bound.cells(n_prompt if bound.kind == "ratio" else 2**31 - 1, bytes_per_cell(model.info, **types))
    if bound.kind == "bytes":
        n_cell -= n_cell % CELL_PAD
    if n_cell < MIN_CELLS:
        raise ContextError(f"a cache of {bound} has {n_cell} cells: it takes at least {MIN_CELLS}")
    return n_cell
