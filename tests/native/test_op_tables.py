"""What we add to llama.cpp can be computed by the CPU, CUDA, Metal and Vulkan, as upstream lists it in docs/ops/*.csv.

The operations are read on the wire to an RPC server, so that none is forgotten: those of the model's graph that are
there with a csp only, and those of our own graphs, which one backend computes alone.

EDGE_CSP_UPSTREAM names the source package that holds the tables, or its extracted folder.
"""

from __future__ import annotations

import csv
import ctypes
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from llama_cpp import _ggml

from edge_csp.native import Csp
from tests.native.cache import sequence_state
from tests.native.conftest import add_server, open_on
from tests.native.rpc_tap import Node, Tensor, rpc_tap
from tests.native.test_keep import random_cells
from tests.oracle.random_models import make_model
from tests.rpc_server import rpc_server

BACKENDS = ["CPU", "CUDA", "Metal", "Vulkan"]
CACHES = ["f32", "f16", "bf16", "q8_0", "q4_0"]
LAYOUTS = [  # K type, V type, flash attention
    *[(kind, kind, True) for kind in CACHES],
    *[(kind, kind, False) for kind in ("f32", "f16", "bf16")],
    ("q8_0", "f16", False),
]
WAYS = ["graph", "graph-portable"]  # LLAMA_CSP_SCORES: the same scores by other operations
NOTHING_TO_COMPUTE = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}

Operation = tuple[str, frozenset[tuple[str, str]]]  # its name, and those of the tables' op_params that decide


# --- what the tables list ---------------------------------------------------------------------------------------------


class Table:
    """docs/ops/BACKEND.csv"""

    def __init__(self, lines: Iterable[str]) -> None:
        self.cases: dict[str, list[tuple[dict[str, str], bool]]] = {}
        for row in csv.DictReader(lines):
            params = dict(re.findall(r"(\w+)=(\[[^]]*\]|[^,[]+)", row["op_params"]))
            if row["op_name"] == "SET_ROWS" and "type" in params:  # older tables: the source is f32
                params |= {"type_src": "f32", "type_dst": params["type"]}
            if "type_KV" in params:
                params |= {"type_K": params["type_KV"], "type_V": params["type_KV"]}
            if "nr" in params:  # repeats in dimensions 2 and 3
                params["nr_3"] = params["nr"].strip("[]").split(",")[1]
            self.cases.setdefault(row["op_name"], []).append((params, row["supported"] == "1"))

    def supports(self, operation: Operation) -> bool:
        """There are cases with these parameters, and all are supported."""
        name, wanted = operation
        found = [supported for params, supported in self.cases.get(name, []) if wanted <= params.items()]
        return bool(found) and all(found)

    def lost_by_sinks(self, name: str) -> list[dict[str, str]]:
        """Cases that are supported without sinks only."""
        plain = {
            frozenset((params | {"sinks": "1"}).items()): supported
            for params, supported in self.cases[name]
            if params["sinks"] == "0"
        }
        with_sinks = [(params, supported) for params, supported in self.cases[name] if params["sinks"] == "1"]
        assert any(supported for _, supported in with_sinks)
        return [params for params, supported in with_sinks if not supported and plain[frozenset(params.items())]]


@pytest.fixture(scope="module")
def tables() -> dict[str, Table]:
    source = os.environ.get("EDGE_CSP_UPSTREAM")
    if not source:
        pytest.skip("EDGE_CSP_UPSTREAM is not set: no source package with docs/ops/*.csv")
    names = {f"vendor/llama.cpp/docs/ops/{backend}.csv": backend for backend in BACKENDS}
    if Path(source).is_dir():
        texts = {backend: (Path(source) / name).read_text(encoding="utf-8") for name, backend in names.items()}
    else:
        texts = {}
        with tarfile.open(source) as archive:
            for member in archive:
                backend = names.get(member.name.partition("/")[2])
                file = archive.extractfile(member) if backend else None
                if backend and file:
                    texts[backend] = file.read().decode()
    assert texts.keys() == set(BACKENDS)
    return {backend: Table(text.splitlines()) for backend, text in texts.items()}


# --- what we emit ----------------------------------------------------------------------------------------------------


def describe(node: Node) -> Operation:
    """In the words of the tables."""
    out, (a, b, c, d, e, *_) = node.tensor, node.src
    name = name_of("ggml_op_name", out.op)
    params: dict[str, str]
    match name, a, b, c:
        case "SET_ROWS", Tensor(), Tensor(), _:
            params = {"type_src": type_of(a), "type_dst": type_of(out), "type_idx": type_of(b)}
        case "MUL_MAT", Tensor(), Tensor(), _:
            params = {"type_a": type_of(a), "type_b": type_of(b), "per": order_of(a), "nr_3": str(b.ne[3] // a.ne[3])}
        case "OUT_PROD", Tensor(), Tensor(), _:
            params = {"type_a": type_of(a), "type_b": type_of(b), "trans_b": str(int(b.nb[0] > b.nb[1]))}
        case "SOFT_MAX", Tensor(), Tensor(), _:
            bias = f"{struct.unpack_from('<f', out.op_params, 4)[0]:.6f}"
            params = {"type": type_of(a), "mask": "1", "m_prec": type_of(b), "sinks": str(int(c is not None))}
            params["max_bias"] = bias
        case "FLASH_ATTN_EXT", Tensor(), Tensor(), Tensor():
            params = {"type_K": type_of(b), "type_V": type_of(c), "mask": str(int(d is not None))}
            params["sinks"] = str(int(e is not None))
        case "CONT", Tensor(), _, _:
            params = {"type": type_of(a), "use_view_slice": "0"}
        case "GET_ROWS", Tensor(), Tensor(), _:
            params = {"type": type_of(a), "v": "0"}
        case "CPY", Tensor(), Tensor(), _:
            params = {"type_src": type_of(a), "type_dst": type_of(out)}
        case _:  # upstream's; of ours no table would list it like this
            params = {str(i): type_of(tensor) for i, tensor in enumerate([out, *node.src]) if tensor}
    return name, frozenset(params.items())


def name_of(function: str, number: int) -> str:
    name = getattr(_ggml.libggml, function)
    name.restype = ctypes.c_char_p
    return str(name(number).decode())


def type_of(tensor: Tensor) -> str:
    return name_of("ggml_type_name", tensor.type)


def order_of(tensor: Tensor) -> str:
    """Of the dimensions in memory, as the parameter `per`."""
    wide = [i for i in range(4) if tensor.ne[i] > 1]
    order = list(range(4))
    for i, dimension in zip(wide, sorted(wide, key=lambda i: tensor.nb[i]), strict=True):
        order[i] = dimension
    return f"[{','.join(map(str, order))}]"


@dataclass
class Emitted:
    """By one layout of the cache."""

    model: set[Operation] = field(default_factory=set)
    scores: dict[str, set[Operation]] = field(default_factory=dict)  # by way; "": ours, where nobody asks for one
    keep: set[Operation] = field(default_factory=set)

    def all(self) -> set[Operation]:
        return self.model.union(self.keep, *self.scores.values())


def operations(nodes: list[Node]) -> Counter[Operation]:
    return Counter(operation for operation in map(describe, nodes) if operation[0] not in NOTHING_TO_COMPUTE)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Emitted]:
    """By layout. Heads of 64 elements are whole 32-bit words in every type, so that devices gather them."""
    model = make_model(tmp_path_factory.mktemp("models") / "model.gguf", "llama", n_layer=2, head_dim=64)
    result = {}
    with rpc_server() as endpoint, rpc_tap(endpoint) as tap, pytest.MonkeyPatch.context() as environment:
        open_model = open_on(add_server(tap.endpoint))
        for type_k, type_v, flash in LAYOUTS:
            ours = result[type_k, type_v, flash] = Emitted()
            with open_model(model, type_k=type_k, type_v=type_v, flash_attn=flash) as runtime:
                runtime.decode(np.arange(40))
                plain = operations(tap.take())
                csp = Csp.attach(runtime.ctx)
                for n in (0.0, 1.0):
                    runtime.clear()
                    csp.set_softmax_n(n)
                    runtime.decode(np.arange(40))
                    ours.model |= (operations(tap.take()) - plain).keys()
                for way in ("", *WAYS):
                    if way:
                        environment.setenv("LLAMA_CSP_SCORES", way)
                    for n in (0.0, 1.0):
                        csp.scores(8, n)
                    ours.scores[way] = set(operations(tap.take()))
                environment.delenv("LLAMA_CSP_SCORES")
                csp.keep(random_cells(csp, 20, seed=0))
                sequence_state(runtime)  # waits for the server
                ours.keep = set(operations(tap.take()))
                csp.close()
    return result


# --- tests -----------------------------------------------------------------------------------------------------------


def test_every_operation_of_our_sources_is_recorded(emitted: dict[tuple[str, str, bool], Emitted]) -> None:
    """An operation added to native/src is seen here, or this test has to learn how to reach it."""
    header = (Path(llama_cpp.__file__).parent / "include" / "ggml.h").read_text(encoding="utf-8")
    names = re.findall(r"^\s*GGML_OP_(\w+)[,\s]", header, re.MULTILINE)
    makers = re.findall(r"GGML_API\s+struct ggml_tensor\s*\*\s*(ggml_\w+)\s*\(\s*struct ggml_context", header)
    assert len(names) > 80
    assert {"ggml_mul_mat", "ggml_view_3d", "ggml_new_tensor_1d"} <= set(makers)

    folder = Path(__file__).parents[2] / "native" / "src"
    sources = "".join(file.read_text(encoding="utf-8") for file in folder.glob("*.cpp"))
    made = set(re.findall(r"\bGGML_OP_(\w+)", sources)) - NOTHING_TO_COMPUTE
    for maker in set(makers) & set(re.findall(r"\b(ggml_\w+)\(", sources)):
        words = maker.removeprefix("ggml_").upper()
        found = [name for name in names if f"{words}_".startswith(f"{name}_")]
        made |= {"CPY"} if words == "CAST" else {max(found, key=len)} if found else set()
    made -= NOTHING_TO_COMPUTE
    assert {"MUL_MAT", "SOFT_MAX", "SET_ROWS", "GET_ROWS", "CPY"} <= made
    assert made <= {name for ours in emitted.values() for name, _ in ours.all()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_the_graph_of_the_model(
    backend: str, tables: dict[str, Table], emitted: dict[tuple[str, str, bool], Emitted]
) -> None:
    """The ring is filled where it lies, and sinks never send attention to another backend."""
    ours = set().union(*(layout.model for layout in emitted.values()))
    assert {name for name, _ in ours} == {"SET_ROWS", "SOFT_MAX", "FLASH_ATTN_EXT"}
    for operation in ours:
        if operation[0] == "FLASH_ATTN_EXT":  # which types it has is upstream's matter
            assert ("sinks", "1") in operation[1]
            assert tables[backend].lost_by_sinks("FLASH_ATTN_EXT") == []
        else:
            assert tables[backend].supports(operation), operation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("type_k", CACHES)
def test_scores(
    backend: str, type_k: str, tables: dict[str, Table], emitted: dict[tuple[str, str, bool], Emitted]
) -> None:
    """One way at least is supported from end to end; without OUT_PROD (Metal) it is the portable one."""
    for (kind, _, _), ours in emitted.items():
        if kind == type_k:
            missing = {way: [op for op in ours.scores[way] if not tables[backend].supports(op)] for way in WAYS}
            assert not all(missing.values()), missing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("type_k", CACHES)
def test_scores_on_an_rpc_server(
    backend: str, type_k: str, tables: dict[str, Table], emitted: dict[tuple[str, str, bool], Emitted]
) -> None:
    """The client does not know the backend of the server, and asks for what all have; but for the product of quantised
    keys, as attention does without flash attention: with keys that are not quantised it would be rounded otherwise.
    """
    expected = {"MUL_MAT"} if backend == "Vulkan" and type_k in ("q8_0", "q4_0") else set()
    for (kind, _, _), ours in emitted.items():
        if kind == type_k:
            assert {
                name for name, params in ours.scores[""] if not tables[backend].supports((name, params))
            } == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep(backend: str, tables: dict[str, Table], emitted: dict[tuple[str, str, bool], Emitted]) -> None:
    """32-bit integers are gathered and copied, whatever the type of the cache."""
    ours = set().union(*(layout.keep for layout in emitted.values()))
    assert {name for name, _ in ours} == {"GET_ROWS", "CPY"}
    for operation in ours:
        assert ("type", "i32") in operation[1] or ("type_src", "i32") in operation[1]
        assert tables[backend].supports(operation), operation
