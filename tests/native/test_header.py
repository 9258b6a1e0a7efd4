"""The header, the ctypes table and the patches say the same."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

from edge_csp import native

NATIVE = Path(__file__).parents[2] / "native"


def code_of(path: Path) -> str:
    return re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))


HEADER = code_of(NATIVE / "include/llama-csp.h")

VALUES: dict[str, Any] = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "llama_seq_id": ctypes.c_int32,
    "size_t": ctypes.c_size_t,
    "float": ctypes.c_float,
    "llama_csp_params": native.Params,
    "llama_csp_select_params": native.SelectParams,
}
POINTERS: dict[str, Any] = {
    "char*": ctypes.c_char_p,
    "llama_context*": ctypes.c_void_p,
    "llama_csp*": ctypes.c_void_p,
    "llama_csp**": ctypes.POINTER(ctypes.c_void_p),
    "llama_csp_info*": ctypes.POINTER(native.Info),
    "float*": ctypes.POINTER(ctypes.c_float),
    "int32_t*": ctypes.POINTER(ctypes.c_int32),
    "uint8_t*": ctypes.POINTER(ctypes.c_uint8),
}


def ctype_of(declaration: str, *, has_name: bool) -> Any:
    """`const struct llama_csp * csp` -> c_void_p"""
    words = [word for word in re.findall(r"\w+|\*", declaration) if word not in ("const", "struct")]
    return (VALUES | POINTERS)["".join(words[:-1] if has_name else words)]


def declared_functions() -> dict[str, tuple[Any, list[Any]]]:
    functions = {}
    for result, name, arguments in re.findall(r"LLAMA_API\s+([\w\s*]+?)\s*\b(\w+)\s*\(([^)]*)\)\s*;", HEADER):
        parts = [] if arguments.strip() == "void" else arguments.split(",")
        functions[name] = ctype_of(result, has_name=False), [ctype_of(part, has_name=True) for part in parts]
    return functions


def test_functions() -> None:
    declared = declared_functions()
    assert len(declared) == HEADER.count("LLAMA_API") >= 12
    assert list(declared) == list(native.PROTOTYPES)
    assert declared == native.PROTOTYPES


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("llama_csp_params", native.Params),
        ("llama_csp_info", native.Info),
        ("llama_csp_select_params", native.SelectParams),
    ],
)
def test_structures(name: str, structure: type[ctypes.Structure]) -> None:
    body = re.search(rf"struct {name} {{(.*?)}};", HEADER, re.DOTALL)
    assert body is not None
    fields = [part.split() for part in body[1].split(";") if part.strip()]
    assert [(field, VALUES[kind]) for kind, field in fields] == list(structure._fields_)


def test_every_structure_is_compared() -> None:
    assert {*re.findall(r"struct (\w+) {", HEADER)} == {"llama_csp_params", "llama_csp_info", "llama_csp_select_params"}


def test_constants() -> None:
    constants = dict(re.findall(r"(LLAMA_CSP_\w+)\s*=\s*(-?\d+)", HEADER))
    assert int(constants["LLAMA_CSP_MODALITY_AUTO"]) == native.MODALITY_AUTO
    for name in ("TEXT", "IMAGE", "AUDIO"):
        assert getattr(native, name) == int(constants[f"LLAMA_CSP_MODALITY_{name}"])


def test_defaults() -> None:
    params = native._call("llama_csp_default_params")
    defaults = native.Csp.attach.__func__.__kwdefaults__  # type: ignore[attr-defined]
    assert {name: getattr(params, name) for name, _ in native.Params._fields_} == defaults


def test_patches_call_the_declared_hooks() -> None:
    """Every hook is called by a patch, and a patch calls nothing else of ours."""
    hooks = code_of(NATIVE / "src/llama-csp-hooks.h")
    declared = {*re.findall(r"\b(llama_csp_\w+)\s*\(", hooks)}
    added = [
        line
        for patch in (NATIVE / "patches").glob("*.patch")
        for line in patch.read_text(encoding="utf-8").splitlines()
        if line.startswith("+") and not line.startswith("+++")
    ]
    called = {*re.findall(r"\b(llama_csp_\w+)\s*\(", "\n".join(added))}
    assert called == declared
    assert len(added) <= 60
