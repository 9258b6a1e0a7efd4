"""Options that commands share, and what they make: a session.

Options are dataclasses, one per group of the help; `grouped` turns the fields into options of a command. Names are
llama.cpp's where it has one. Defaults are those of the classes they go to (a test compares them): importing these
classes would load numpy.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Option

from edge_csp.errors import BudgetError, EdgeCspError, ModelError, NativeError, SamplingError

if TYPE_CHECKING:
    from edge_csp.chat import Message
    from edge_csp.embeddings import EmbeddingCache
    from edge_csp.model import Progress
    from edge_csp.pruning import Pruning
    from edge_csp.sampling import Sampling
    from edge_csp.session import Session

DEMO = Path(__file__).parents[1] / "demo"
"""The embedded model and its album."""

_model = partial(Option, rich_help_panel="Model")
_context = partial(Option, rich_help_panel="Context")
_pruning = partial(Option, rich_help_panel="Pruning")
_sampling = partial(Option, rich_help_panel="Sampling")
_prompt = partial(Option, rich_help_panel="Prompt")

Threads = Annotated[
    int, _model("-t", "--threads", metavar="N", help="Threads; -1: the cores that this process may use.")
]
Prompt = Annotated[str | None, _prompt("-p", "--prompt", metavar="TEXT", help="What to ask; -: read it from stdin.")]
Images = Annotated[
    list[Path], _prompt("--image", metavar="FILE", help="Picture that comes with the prompt; may be repeated.")
]


@dataclass(frozen=True)
class ModelOptions:
    model: Annotated[
        str | None,
        _model("-m", "--model", metavar="FILE", help="GGUF text model; `demo` is the model that comes with edge-csp."),
    ] = None
    mmproj: Annotated[
        Path | None,
        _model("--mmproj", metavar="FILE", help="GGUF that reads pictures; by default the one beside the model."),
    ] = None
    hf_repo: Annotated[
        str | None,
        _model("-hf", "--hf-repo", metavar="USER/REPO[:QUANT]", help="Model on the Hugging Face hub."),
    ] = None
    offline: Annotated[bool, _model("--offline", help="Use only what is in the cache of the hub.")] = False
    threads: Threads = -1
    gpu_layers: Annotated[
        int, _model("-ngl", "--gpu-layers", metavar="N", help="Layers on the GPU, if there is one; -1: all.")
    ] = -1
    rpc: Annotated[
        str | None,
        _model("--rpc", metavar="HOST:PORT,…", help="RPC servers of llama.cpp that take layers as local GPUs do."),
    ] = None
    no_mmap: Annotated[bool, _model("--no-mmap", help="Read the model into memory instead of mapping it.")] = False
    embedding_cache: Annotated[
        str,
        _model(
            "--embedding-cache",
            metavar="SIZE|off",
            help="Disk for embeddings of pictures, so that none is encoded twice; its folder: EDGE_CSP_CACHE_DIR.",
        ),
    ] = "2GiB"

    def paths(self) -> tuple[Path, Path | None]:
        """Files of the model and its mmproj, downloaded if need be."""
        if self.model and self.hf_repo:
            raise ModelError("both -m and -hf are given; use one of them")
        if self.model == "demo":
            model, mmproj = demo_files()
            return model, self.mmproj or mmproj
        if self.model:
            return Path(self.model), self.mmproj
        if not self.hf_repo:
            raise ModelError(
                "no model: give a GGUF file with -m, or -hf USER/REPO[:QUANT] to download one "
                "(`edge-csp demo` and `-m demo` use the embedded model and need none)"
            )
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
        from edge_csp.download import resolve_hf

        model, found = resolve_hf(self.hf_repo, mmproj=self.mmproj is None)
        return model, self.mmproj or found

    def settings(self) -> dict[str, Any]:
        """Arguments of open_session()."""
        return {
            "n_threads": self.threads if self.threads > 0 else None,
            "n_gpu_layers": self.gpu_layers,
            "use_mmap": not self.no_mmap,
            "rpc": self.rpc.split(",") if self.rpc else (),
            "embedding_cache": self._embedding_cache(),
        }

    def _embedding_cache(self) -> EmbeddingCache | None:
        if self.embedding_cache == "off":
            return None
        from edge_csp.budget import parse_budget
        from edge_csp.cli.render import say
        from edge_csp.embeddings import EmbeddingCache

        given = clean(self.embedding_cache)
        try:
            size = parse_budget(given)
        except BudgetError:
            size = None
        if size is None or size.kind != "bytes":
            raise EdgeCspError(f"--embedding-cache {given!r} is no size in bytes: write 2GiB, 500MB or off")
        return EmbeddingCache(limit=int(size.value), on_notice=say)


@dataclass(frozen=True)
class ContextOptions:
    ctx_size: Annotated[
        int,
        _context(
            "-c", "--ctx-size", metavar="N", min=0, max=2**31 - 1, help="Cells of the KV cache; 0: the trained size."
        ),
    ] = 4096
    batch_size: Annotated[
        int, _context("-b", "--batch-size", metavar="N", min=1, max=2**31 - 1, help="Tokens evaluated at once.")
    ] = 512
    flash_attn: Annotated[str, _context("-fa", "--flash-attn", metavar="on|off|auto", help="Flash attention.")] = "auto"
    cache_type_k: Annotated[
        str, _context("-ctk", "--cache-type-k", metavar="TYPE", help="Type of K in the cache: f16, q8_0, q4_0 …")
    ] = "f16"
    cache_type_v: Annotated[str, _context("-ctv", "--cache-type-v", metavar="TYPE", help="Type of V in the cache.")] = (
        "f16"
    )
    attn_softmax_n: Annotated[
        float, _context("--attn-softmax-n", metavar="N", help="n of the softmax in attention itself; 0: the usual one.")
    ] = 0.0

    def settings(self) -> dict[str, Any]:
        """Arguments of Context."""
        return {
            "n_ctx": self.ctx_size,
            "n_batch": self.batch_size,
            "flash_attn": self.flash_attn,
            "type_k": self.cache_type_k,
            "type_v": self.cache_type_v,
            "softmax_n": self.attn_softmax_n,
        }


@dataclass(frozen=True)
class PruningOptions:
    budget: Annotated[
        str | None,
        _pruning(
            "--budget",
            metavar="SIZE",
            help="What stays of the KV cache after every prompt: 20%, 512 (cells) or 64MiB; by default all that fits.",
        ),
    ] = None
    cells: Annotated[
        str | None,
        _pruning(
            "--cells",
            metavar="SIZE",
            help="Size of the cache, instead of -c, in cells (1024), bytes (64MiB) or as a share of the prompt (20%, "
            "run only). Any conversation fits: what is too much is evicted while reading and answering.",
        ),
    ] = None
    policy: Annotated[
        str,
        _pruning(
            "--policy",
            metavar="NAME",
            help="What chooses the cells: blend, blend+ (with a rehearsal), csp, snapkv, h2o, lookm, streaming, "
            "keydiff, random, full (keeps all), or your own: module:Class, file.py:Class (docs/policies.md).",
        ),
    ] = "blend"
    policy_set: Annotated[
        list[str],
        _pruning("--policy-set", metavar="NAME=VALUE", help="A setting of the policy; may be repeated."),
    ] = field(default_factory=list)
    cross_ratio: Annotated[
        float | None,
        _pruning("--cross-ratio", metavar="R", help="csp: share of the cells that the other modality chooses, 0 to 1."),
    ] = None
    pool: Annotated[
        int | None,
        _pruning(
            "--pool",
            metavar="N",
            help="csp, snapkv: average scores over N neighbouring cells, an odd number; by default 1 (off), snapkv 5.",
        ),
    ] = None
    softmax_n: Annotated[float, _pruning("--softmax-n", metavar="N", help="n of the softmax that scores.")] = 1.0
    min_cells: Annotated[
        int, _pruning("--min-cells", metavar="N", help="A share of --budget keeps at least so many cells.")
    ] = 128
    n_obs: Annotated[int, _pruning("--n-obs", metavar="N", min=1, help="Last queries, which vote.")] = 32
    n_recent: Annotated[int, _pruning("--n-recent", metavar="N", help="Last cells, which stay.")] = 32
    n_sink: Annotated[int, _pruning("--n-sink", metavar="N", help="First cells, which stay.")] = 4
    cue: Annotated[
        list[str],
        _pruning(
            "--cue",
            metavar="TEXT",
            help="blend+: what to ask about every picture before cells go, {n} is its number; may be repeated. By "
            "default the lines of MODEL.cues beside MODEL.gguf, or 'Describe picture {n}.'",
        ),
    ] = field(default_factory=list)
    reread: Annotated[
        float,
        _pruning(
            "--reread",
            metavar="SHARE",
            help="Read pictures again for an answer that looks at them with at least this share of its attention, if "
            "most of their cells are gone: 0.1, say; 0: never.",
        ),
    ] = 0.0

    def pruning(self) -> Pruning:
        from edge_csp.budget import parse_budget
        from edge_csp.policy import make_policy
        from edge_csp.pruning import Pruning

        given = {name: getattr(self, name) for name in ("cross_ratio", "pool") if getattr(self, name) is not None}
        return Pruning(
            parse_budget(self.budget) if self.budget else None,
            make_policy(clean(self.policy), map(clean, self.policy_set), **given),
            min_cells=self.min_cells,
            n_obs=self.n_obs,
            n_recent=self.n_recent,
            n_sink=self.n_sink,
            softmax_n=self.softmax_n,
            cues=tuple(map(clean, self.cue)),
            reread=self.reread,
        )


@dataclass(frozen=True)
class SamplingOptions:
    temp: Annotated[
        float, _sampling("--temp", "--temperature", metavar="T", help="Temperature; 0: always the likeliest token.")
    ] = 0.8
    top_k: Annotated[int, _sampling("--top-k", metavar="N", help="Only the N likeliest tokens; 0: off.")] = 40
    top_p: Annotated[
        float, _sampling("--top-p", metavar="P", help="Only the likeliest tokens that sum to P; 1: off.")
    ] = 0.95
    min_p: Annotated[
        float, _sampling("--min-p", metavar="P", help="Only tokens at least P times as likely as the best; 0: off.")
    ] = 0.05
    repeat_penalty: Annotated[
        float, _sampling("--repeat-penalty", metavar="X", help="Penalty for tokens that came before; 1: off.")
    ] = 1.0
    repeat_last_n: Annotated[
        int, _sampling("--repeat-last-n", metavar="N", help="Tokens that the penalty looks back; -1: all.")
    ] = 64
    seed: Annotated[int, _sampling("-s", "--seed", metavar="N", help="Seed; -1: a new one every time.")] = -1
    grammar: Annotated[
        str | None, _sampling("--grammar", metavar="GBNF", help="Grammar that the answer must follow.")
    ] = None
    grammar_file: Annotated[Path | None, _sampling("--grammar-file", metavar="FILE", help="A file with it.")] = None
    json_schema: Annotated[
        str | None, _sampling("-j", "--json-schema", metavar="JSON", help="JSON schema that the answer must follow.")
    ] = None

    def sampling(self) -> Sampling:
        from edge_csp.sampling import Sampling

        if self.grammar and self.grammar_file:
            raise SamplingError("both --grammar and --grammar-file are given; use one of them")
        return Sampling(
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            repeat_last_n=self.repeat_last_n,
            seed=self.seed,
            grammar=read_text(self.grammar_file) if self.grammar_file else self.grammar,
            json_schema=self.json_schema,
        )


@dataclass(frozen=True)
class PromptOptions:
    prompt: Prompt = None
    image: Images = field(default_factory=list)
    system_prompt: Annotated[str | None, _prompt("-sys", "--system-prompt", metavar="TEXT", help="System message.")] = (
        None
    )
    predict: Annotated[
        int,
        _prompt("-n", "--predict", "--n-predict", metavar="N", min=-1, help="Most tokens of an answer; -1: no limit."),
    ] = -1
    past_trained: Annotated[
        str,
        _prompt(
            "--past-trained",
            metavar="continue|stop",
            help="What happens where a conversation is longer than the context that the model was trained on.",
        ),
    ] = "continue"

    def settings(self) -> dict[str, Any]:
        """Arguments of open_session()."""
        return {
            "system": clean(self.system_prompt) if self.system_prompt else None,
            "past_trained": self.past_trained,
        }


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take dataclasses of options: every field becomes an option.

    A parameter that has an instance as its default takes the defaults of the fields from there.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if not (isinstance(kind, type) and is_dataclass(kind)):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = kind
        defaults = kind() if parameter.default is parameter.empty else parameter.default
        hints = get_type_hints(kind, include_extras=True)
        parameters += [
            inspect.Parameter(
                option.name,
                parameter.KEYWORD_ONLY,
                default=getattr(defaults, option.name),
                annotation=hints[option.name],
            )
            for option in fields(kind)
        ]

    @wraps(command)
    def flat(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{option.name: values.pop(option.name) for option in fields(kind)})
        command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


@contextmanager
def opened(
    model: ModelOptions,
    context: ContextOptions,
    pruning: PruningOptions,
    sampling: SamplingOptions,
    prompt: PromptOptions,
    *,
    cells_of: Sequence[Message] = (),
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Iterator[Session]:
    """A session with these options. on_notice: told its notices; default: they go to stderr."""
    from edge_csp.cli.render import say
    from edge_csp.native import UNSUPPORTED
    from edge_csp.opening import open_session

    prunes = pruning.policy != "full" or context.attn_softmax_n != 0
    settings: dict[str, Any] = {"pruning": pruning.pruning(), "sampling": sampling.sampling(), "cells": pruning.cells}
    path, mmproj = model.paths()
    with ExitStack() as stack:
        try:
            opening = open_session(
                path,
                mmproj,
                cells_of=cells_of,
                prune=prunes,
                on_progress=on_progress,
                on_notice=on_notice or say,
                **settings,
                **prompt.settings(),
                **model.settings(),
                **context.settings(),
            )
            session = stack.enter_context(opening)
        except NativeError as error:
            if error.status != UNSUPPORTED:
                raise
            raise NativeError(f"{path} cannot be pruned: {error} (without --budget and --cells it runs)") from error
        yield session


def demo_files() -> tuple[Path, Path]:
    """Text model and mmproj that come with edge-csp."""
    files = DEMO / "demo-text-f16.gguf", DEMO / "demo-mmproj-f16.gguf"
    for file in files:
        if not file.is_file():
            raise ModelError(f"the embedded model is not installed: {file} is missing")
    return files


def read_text(path: Path) -> str:
    """Content of a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EdgeCspError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


def clean(text: str) -> str:
    """Text from the command line without what is not UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
