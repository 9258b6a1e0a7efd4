"""What a conversation will take, before anything is loaded: cells, bytes of cache, weights, encoder, peak.

llama.cpp and libmtmd are the estimators. A model opened with no_alloc reads metadata only and then does everything else
that loading does: it chooses where every tensor goes (and what the CPU backend repacks), sizes the caches (sliding
windows, recurrent states, shared layers), and reserves its graphs, whose scratch no formula gives. libmtmd, opened on
such a model, cuts a picture into tiles and counts their tokens for every projector that it knows. So there is no table
per architecture here; what is added is what edge-csp itself keeps, the one large thing that ggml allocates while it
computes (CacheCost.work), and the sum.

Not counted: the program without a model (about 0.1 GiB), vocabulary, small buffers of kernels, and the pictures while
they are decoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edge_csp import native
from edge_csp.budget import MIN_CELLS, Budget
from edge_csp.context import CELL_PAD, OBSERVED_CELLS, Context
from edge_csp.errors import ContextError, ImageError, ModelError, NativeError
from edge_csp.images import MAX_SIDE, load_picture
from edge_csp.metadata import tensor_spans
from edge_csp.model import EMBEDDING_CACHE_BYTES, PicturePart, VisionModel
from edge_csp.pruning import Pruning

TEXT_TOKENS, TEXT_TOKENS_PER_PICTURE = 512, 16
"""Text that is assumed: questions, answers and template, and the words that come with every picture."""
MAX_CELLS = 2**31 - 1
_RANKING_BYTES = 35  # what the default policy takes per (layer, KV head, cell) at most
_STEP = 2**15  # contexts of 1 and 2 steps tell what every further cell takes; larger ones are extrapolated from them


@dataclass(frozen=True)
class PictureCost:
    """A picture of size (width, height) in pixels: n_tile parts, each encoded alone, fill n_cell cells and move the
    position by n_pos; n_marker text tokens around them come with it. scratch: bytes that the encoder works in.
    """

    size: tuple[int, int]
    n_tile: int
    n_cell: int
    n_pos: int
    n_marker: int
    scratch: int


@dataclass(frozen=True)
class CacheCost:
    """A cache of n_cell cells, for which llama.cpp allocates n_ctx. All others in bytes of host memory.

    kv: the cache. compute: scratch of the graphs. work: what the CPU's kernels convert in. ring: the observation
    window. scores: positions, tags and scores while the policy chooses. device: cache and scratch on GPUs and RPC
    servers.
    """

    n_cell: int
    n_ctx: int
    kv: int
    compute: int
    work: int
    ring: int
    scores: int
    device: int


@dataclass(frozen=True)
class Plan:
    """What a conversation takes with the whole cache, and with a bounded one. Bytes of host memory, where not said."""

    model: Path
    mmproj: Path | None
    n_image: int
    picture: PictureCost | None
    n_text: int
    n_cell: int
    """Cells that the whole conversation fills."""
    n_kept: int
    """Cells of these that the budget keeps; all, if the cache cannot be pruned."""
    n_pos: int
    """Positions that it takes; fewer than cells, where the model counts a picture by its sides."""
    n_ctx_train: int
    bytes_per_cell: int
    """Bytes that every further cell takes in the cache."""
    weights: int
    """As they are in the file. Mapped ones can be given back to the system, and read again."""
    mapped: bool
    repacked: int
    """Copies of weights, rearranged for the instructions of this CPU."""
    loading: int
    """While weights are read: all of a mapped file, and the copies."""
    device_weights: int
    """On GPUs and RPC servers."""
    encoder: int
    encoder_on_device: bool
    embeddings: int
    """Embeddings of pictures, kept for the next time."""
    logits: int
    whole: CacheCost
    bounded: CacheCost
    memory: int
    """Memory of this machine."""
    notes: tuple[str, ...]
    """What does not fit, and what would."""

    def peak(self, cache: CacheCost) -> int:
        """Host memory at most."""
        encoder = 0 if self.encoder_on_device else self._encoder
        text = self.weights + self.repacked + self.logits + self.embeddings
        conversation = text + encoder + cache.kv + cache.compute + cache.work + cache.ring + cache.scores
        return max(conversation, self.loading)

    def device(self, cache: CacheCost) -> int:
        """Memory of GPUs and RPC servers together."""
        return self.device_weights + cache.device + (self._encoder if self.encoder_on_device else 0)

    @property
    def _encoder(self) -> int:
        return self.encoder + (self.picture.scratch if self.picture else 0)


def make_plan(
    path: str | Path,
    mmproj: str | Path | None = None,
    *,
    budget: Budget,
    n_image: int = 0,
    image_size: tuple[int, int] | None = None,
    n_text: int | None = None,
    n_ctx: int = 0,
    cells: Budget | None = None,
    n_window: int = 32,
    n_gpu_layers: int = -1,
    use_mmap: bool = True,
    rpc: Sequence[str] = (),
    **settings: Any,
) -> Plan:
    """Plan a conversation with n_image pictures of image_size (width, height; default: what the encoder takes).

    n_text: tokens of text in it; default TEXT_TOKENS, and TEXT_TOKENS_PER_PICTURE for every picture. budget: what
    stays after an eviction. n_ctx: cells of the whole cache, 0 for as many as needed. cells: size of the bounded cache;
    default what stays, and a third more for what is new (see Pruner.n_batch). settings: those of Context.

    Raises ModelError, BudgetError, ImageError and ContextError like the classes that a session is made of.
    """
    if n_image < 0 or (n_text or 0) < 0 or n_ctx < 0:
        raise ContextError(f"{n_image} pictures, {n_text} tokens of text, {n_ctx} cells: numbers cannot be negative")
    with VisionModel(path, mmproj, n_gpu_layers=n_gpu_layers, rpc=rpc, no_alloc=True) as model:
        picture = _picture(model, image_size) if n_image else None
        if n_text is None:
            n_text = TEXT_TOKENS + TEXT_TOKENS_PER_PICTURE * n_image
        n_cell, n_pos = n_text, n_text
        if picture:
            n_cell += n_image * (picture.n_cell + picture.n_marker)
            n_pos += n_image * (picture.n_pos + picture.n_marker)
        if n_cell < 1 or max(n_cell, n_ctx) > MAX_CELLS:
            raise ContextError(f"{max(n_cell, n_ctx)} cells are to be planned, allowed are 1 .. {MAX_CELLS}")

        measure = _Measure(model, n_window, settings)
        n_kept = n_cell if measure.refused else budget.cells(n_cell, measure.bytes_per_cell, Pruning.min_cells)
        n_bound = _bounded_cells(cells, n_cell, n_kept, measure.bytes_per_cell)
        if cells and not measure.refused:
            n_kept = min(n_kept, n_bound)
        whole, bounded = measure(n_ctx or n_cell), measure(n_bound)
        memory = measure.memory
        plan = Plan(
            model=model.info.path,
            mmproj=model.mmproj_info.path if model.mmproj_info else None,
            n_image=n_image,
            picture=picture,
            n_text=n_text,
            n_cell=n_cell,
            n_kept=n_kept,
            n_pos=n_pos,
            n_ctx_train=model.info.n_ctx_train,
            bytes_per_cell=measure.bytes_per_cell,
            weights=_mapped_bytes(model) if use_mmap else memory.weights,
            mapped=use_mmap,
            repacked=memory.repacked,
            loading=(model.info.tensor_bytes if use_mmap else memory.weights) + memory.repacked,
            device_weights=memory.device_weights,
            encoder=model.mmproj_info.tensor_bytes if model.mmproj_info else 0,
            encoder_on_device=model.offloaded and not rpc,
            embeddings=_embedding_bytes(model, picture, n_image),
            logits=4 * model.n_vocab,
            whole=whole,
            bounded=bounded,
            memory=_machine_memory(),
            notes=(),
        )
    return replace(plan, notes=tuple(_notes(plan, n_ctx, measure.refused)))


class _Measure:
    """Contexts of a model without data, and what they would take."""

    def __init__(self, model: VisionModel, n_window: int, settings: dict[str, Any]) -> None:
        self.model = model
        self.n_window = n_window
        self.settings = settings
        self.refused = ""
        """Why the cache cannot be pruned; empty if it can."""
        with self._open(_STEP) as context:
            self.memory = native.memory(context.handle)
            self.info = self._attach(context)
        with self._open(2 * _STEP) as context:
            self._twice = native.memory(context.handle)
        self.bytes_per_cell = max((self._kv(self._twice) - self._kv(self.memory)) // _STEP, 1)

    def __call__(self, n_cell: int) -> CacheCost:
        """Cost of a cache of n_cell cells."""
        with self._open(min(n_cell, 2 * _STEP)) as context:
            found = native.memory(context.handle)
            n_found, n_batch = context.n_ctx, context.n_batch
            # without flash attention ggml converts the attention weights of a batch to the type of V, f16 or bf16
            converts = context.flash_attn == "off" and context.type_v != "f32" and found.kv > 0
        further = max(n_cell - n_found, 0)

        def grown(name: str) -> int:
            step: int = getattr(self._twice, name) - getattr(self.memory, name)
            size: int = getattr(found, name)
            return size + step * further // _STEP

        n_ctx = n_found + further
        info = self.info
        return CacheCost(
            n_cell=n_cell,
            n_ctx=n_ctx,
            kv=grown("kv"),
            compute=grown("compute"),
            work=2 * self.model.info.n_head * n_batch * n_ctx if converts else 0,
            ring=4 * info.n_layer * info.n_head * self.model.info.head_dim_k * self.n_window if info else 0,
            scores=_eviction_bytes(info, n_ctx) if info else 0,
            device=grown("device_kv") + grown("device_compute"),
        )

    def _open(self, n_ctx: int) -> Context:
        return Context(self.model, n_ctx=n_ctx, prune=False, **self.settings)

    def _attach(self, context: Context) -> native.Info | None:
        try:
            csp = native.Csp.attach(context.handle, n_window=1)
        except NativeError as error:
            self.refused = str(error)
            return None
        info = csp.info()
        csp.close()
        return info

    @staticmethod
    def _kv(memory: native.MemoryInfo) -> int:
        return memory.kv + memory.device_kv


def _bounded_cells(cells: Budget | None, n_cell: int, n_kept: int, bytes_per_cell: int) -> int:
    """Size of the bounded cache, as a session makes it."""
    if cells is None:
        return max(min(-(-4 * n_kept // 3), n_cell), MIN_CELLS)
    n_bounded = cells.cells(n_cell if cells.kind == "ratio" else MAX_CELLS, bytes_per_cell)
    if cells.kind == "bytes":
        n_bounded -= n_bounded % CELL_PAD
    if n_bounded < MIN_CELLS:
        raise ContextError(f"a cache of {cells} has {n_bounded} cells: it takes at least {MIN_CELLS}")
    return n_bounded


def _eviction_bytes(info: native.Info, n_cell: int) -> int:
    """Bytes that an eviction takes: chosen cells, true positions and tags of all layers, and scores of some layers."""
    n_all = info.n_layer * info.n_head_kv * n_cell
    n_observed = min(n_all, max(OBSERVED_CELLS, info.n_head_kv * n_cell))
    return n_all * (4 + 4 + 1) + n_observed * _score_bytes(info.n_modality)


def _score_bytes(n_modality: int) -> int:
    """Bytes per (layer, KV head, cell) observed: f32 scores and key norm, i32 position, u8 tag, rankings."""
    return 4 * n_modality + 4 + 4 + 1 + _RANKING_BYTES


def _picture(model: VisionModel, size: tuple[int, int] | None) -> PictureCost:
    """Let libmtmd cut an empty picture."""
    info = model.mmproj_info
    if info is None:
        raise ModelError(f"{model.info.path} has no mmproj: it cannot read pictures")
    if size is None:
        if info.image_size < 1:
            raise ImageError(f"{info.path} takes pictures of any size: give one with --image-size")
        size = info.image_size, info.image_size
    if not all(1 <= side <= MAX_SIDE for side in size):
        raise ImageError(f"pictures of {size[0]}x{size[1]} cannot be planned; sides are 1 .. {MAX_SIDE} pixels")
    parts = model.tokenize("<__media__>", [load_picture(Image.new("RGB", size))])
    tiles = [part for part in parts if isinstance(part, PicturePart)]
    return PictureCost(
        size=size,
        n_tile=len(tiles),
        n_cell=sum(tile.n_cell for tile in tiles),
        n_pos=sum(tile.n_pos for tile in tiles),
        n_marker=sum(len(part.tokens) for part in parts if not isinstance(part, PicturePart)),
        scratch=max(model.encoder_scratch(tile) for tile in {tile.n_cell: tile for tile in tiles}.values()),
    )


def _mapped_bytes(model: VisionModel) -> int:
    """What stays mapped of the files: from the first to the last tensor that is used as it is, in every part."""
    spans: dict[int, tuple[int, int]] = {}
    for name, (part, first, last) in tensor_spans(model.info.path).items():
        if native.is_plain(model.handle, name):
            before = spans.get(part, (first, last))
            spans[part] = min(before[0], first), max(before[1], last)
    return sum(last - first for first, last in spans.values())


def _embedding_bytes(model: VisionModel, picture: PictureCost | None, n_image: int) -> int:
    if picture is None:
        return 0
    return min(4 * n_image * picture.n_cell * model.info.n_embd_inp, EMBEDDING_CACHE_BYTES)


def _machine_memory() -> int:
    """Bytes of memory; 0 where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container may have less
        return min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return memory


def _notes(plan: Plan, n_ctx: int, refused: str) -> list[str]:
    """What the user should know."""
    notes = []
    whole, bounded, memory = plan.whole, plan.bounded, plan.memory
    bound = f"--cells {bounded.n_cell}"
    if refused:
        notes.append(f"nothing can be evicted, so the whole cache counts: {refused}")
    if plan.n_pos > plan.n_ctx_train > 0:
        notes.append(f"the conversation takes {plan.n_pos} positions, but the model was trained on {plan.n_ctx_train}")
    if n_ctx and plan.n_cell > whole.n_ctx:
        words = f"the conversation needs {plan.n_cell} cells, but the context has {whole.n_ctx}: raise -c"
        notes.append(words if refused else f"{words}, or give {bound}")
    if memory and plan.peak(whole) > memory:
        words = f"the whole cache makes {plan.peak(whole)} bytes of {memory} bytes of memory"
        if not refused and plan.peak(bounded) <= memory:
            notes.append(f"{words}: it does not fit, but would with {bound}")
        else:
            notes.append(f"{words}: it does not fit; a smaller model, -ctk q8_0 -ctv q8_0 or fewer pictures might")
    return notes
