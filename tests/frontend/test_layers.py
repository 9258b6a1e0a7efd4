"""Imports go one way: cli, server -> plan, opening -> session -> pruning -> context, sampling -> leaves -> errors.

Leaves do not import each other, but for the model, which is made of files and pictures, and
chat, whose messages hold pictures.
"""

import ast
from pathlib import Path

import edge_csp

LEAVES = {"native", "policy", "budget", "images", "model", "chat", "metadata", "download", "embeddings", "rpc"}
MAY_IMPORT = {leaf: {"errors"} for leaf in LEAVES} | {
    "errors": set(),
    "model": {"native", "metadata", "errors", "images", "embeddings", "rpc"},
    "chat": {"errors", "images"},
    "context": {"native", "model", "metadata", "policy", "budget", "errors"},
    "sampling": {"native", "model", "errors"},
    "items": {"model"},
    "overlay": {"errors"},
    "patches": {"items", "policy", "errors"},
    "pruning": {"context", "policy", "budget", "errors"},
    "plan": {"native", "budget", "images", "metadata", "model", "context", "pruning", "session", "errors"},
    "rehearsal": {"chat", "context", "errors", "images", "items", "model", "policy", "sampling"},
    "reread": {"chat", "context", "images", "items", "model"},
    "pins": {"chat", "items", "pruning", "errors"},
    "session": LEAVES
    | {"context", "sampling", "pruning", "rehearsal", "items", "patches", "pins", "reread", "usage", "errors"},
    "usage": {"items"},
    "opening": LEAVES | {"context", "sampling", "pruning", "items", "session", "errors"},
}


def test_imports_go_one_way() -> None:
    root = Path(edge_csp.__file__).parent
    for file in root.rglob("*.py"):
        module = file.relative_to(root).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: imports are absolute"
                names = [f"{node.module}.{name}" if node.module == "edge_csp" else str(node.module) for name in names]
            used = {name.split(".")[1] for name in names if name.startswith("edge_csp.")} - {module, "__version__"}
            assert used <= MAY_IMPORT.get(module, used), f"{file} imports {used}"
