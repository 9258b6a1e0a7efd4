"""English and code that every Python brings: the language reference of pydoc, and sources of the standard library.

Both are Python's own, under the PSF licence, and differ a little from one version to the next: see digest().
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from edge_csp.errors import BenchError

MODULES = """\
argparse base64 calendar cmd configparser contextlib csv dataclasses difflib enum fractions ftplib functools gettext
heapq imaplib ipaddress mailbox optparse pickle plistlib queue random shutil smtplib socketserver statistics
subprocess tempfile textwrap threading traceback uuid
"""
"""One file each in every Python from 3.10 on."""
LEAST_PROSE = 120
"""Characters of a paragraph."""
LETTERS = 0.93
"""Share of letters, blanks and common punctuation in English; tables and grammars have less."""
DOCSTRING = range(100, 700)
"""Characters of a docstring that can be said in a chat."""


@dataclass(frozen=True)
class Described:
    """A function and what its docstring says, on one line per paragraph."""

    name: str
    text: str


@functools.cache
def prose() -> tuple[str, ...]:
    """Paragraphs of English, in the order of the reference. Raises BenchError if this Python has none."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise BenchError("this Python comes without pydoc_data, where English texts are taken from") from error
    found = dict.fromkeys(one for _, text in sorted(topics.items()) for one in paragraphs(text) if _is_prose(one))
    return tuple(found)


@functools.cache
def sources() -> dict[str, str]:
    """Source texts, by the name of the module. Raises BenchError if this Python has none."""
    found = {}
    for name in MODULES.split():
        spec = find_spec(name)
        path = Path(spec.origin) if spec and spec.origin else None
        if path is None or path.suffix != ".py" or not path.is_file():
            raise BenchError(f"this Python comes without the source of {name}, where code is taken from")
        found[name] = path.read_text(encoding="utf-8")
    return found


@functools.cache
def described() -> tuple[Described, ...]:
    """Functions of these modules with a docstring that is not too long."""
    found = []
    for module, source in sources().items():
        for name, node in _functions(ast.parse(source)):
            text = "\n".join(paragraphs(ast.get_docstring(node) or ""))
            if len(text) in DOCSTRING and not name.rpartition(".")[2].startswith("_"):
                found.append(Described(f"{module}.{name}", text))
    return tuple(found)


def _functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Those of the module, and methods as class.name."""
    found = [(node.name, node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for outer in tree.body:
        if isinstance(outer, ast.ClassDef):
            inner = [node for node in outer.body if isinstance(node, ast.FunctionDef)]
            found += [(f"{outer.name}.{node.name}", node) for node in inner]
    return found


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a text, each on one line."""
    return [" ".join(one.split()) for one in re.split(r"\n\s*\n", text) if one.strip()]


def _is_prose(paragraph: str) -> bool:
    plain = sum(one.isalpha() or one in " ,.'’" for one in paragraph)
    return len(paragraph) >= LEAST_PROSE and plain >= LETTERS * len(paragraph) and paragraph.endswith(".")


@functools.cache
def digest() -> str:
    """Of everything above."""
    whole = hashlib.sha256("\n\n".join(prose()).encode())
    for name, text in sources().items():
        whole.update(f"{name} {text}".encode())
    return whole.hexdigest()[:16]
