"""Apply unified diffs strictly, with nothing but the standard library: Windows has neither git apply nor patch(1)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


class PatchError(Exception):
    """One line: patch, file, line, reason."""


@dataclass(frozen=True)
class Hunk:
    start: int  # first line in the old file, from 1
    old: list[str]  # context and removed lines, without line ends
    new: list[str]  # context and added lines


def parse_patch(text: str, name: str) -> dict[str, list[Hunk]]:
    """Hunks of one patch by file, paths without their a/ and b/. Text before a file header is ignored."""
    lines = text.replace("\r\n", "\n").split("\n")
    files: dict[str, list[Hunk]] = {}
    path = ""
    i = 0
    while i < len(lines):
        if lines[i].startswith("--- ") and i + 1 < len(lines) and lines[i + 1].startswith("+++ "):
            old, new = (line[4:].split("\t")[0] for line in lines[i : i + 2])
            path = new[2:]
            if old != f"a/{path}" or new != f"b/{path}" or path in files:
                raise PatchError(f"{name}:{i + 1}: expected one 'a/FILE' to 'b/FILE', got '{old}' to '{new}'")
            files[path] = []
            i += 2
        elif lines[i].startswith("@@"):
            match = _HUNK.match(lines[i])
            if not match or not path:
                raise PatchError(f"{name}:{i + 1}: not a hunk of a file: {lines[i]}")
            n_old, n_new = int(match[2] or 1), int(match[4] or 1)
            hunk = Hunk(int(match[1]), [], [])
            i += 1
            while len(hunk.old) < n_old or len(hunk.new) < n_new:
                line = lines[i] if i < len(lines) else "end of the patch"
                if line[:1] not in (" ", "-", "+", ""):
                    raise PatchError(f"{name}:{i + 1}: inside a hunk: {line}")
                if line[:1] != "+":
                    hunk.old.append(line[1:])
                if line[:1] != "-":
                    hunk.new.append(line[1:])
                i += 1
            if len(hunk.old) != n_old or len(hunk.new) != n_new or n_old == 0:
                raise PatchError(f"{name}:{i}: line counts of the hunk are wrong, or it has no context")
            files[path].append(hunk)
        elif path and lines[i][:1] in ("+", "-", "\\"):
            raise PatchError(f"{name}:{i + 1}: outside a hunk: {lines[i]}")
        else:
            i += 1
    if not any(files.values()):
        raise PatchError(f"{name}: no hunks")
    return files


def apply_hunks(data: bytes, hunks: Sequence[Hunk], where: str) -> bytes:
    """Each hunk must match at its line (moved by the hunks before it) or else at exactly one later place."""
    text = data.decode("utf-8")
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.replace("\r\n", "\n").split("\n")
    end = shift = 0  # lines before `end` are done
    for hunk in hunks:

        def fits(at: int, old: list[str] = hunk.old) -> bool:
            return lines[at : at + len(old)] == old

        at = hunk.start - 1 + shift
        if at < end or not fits(at):
            places = [k for k in range(end, len(lines) - len(hunk.old) + 1) if fits(k)]
            if len(places) != 1:
                raise PatchError(f"{where}:{hunk.start}: hunk matches {len(places)} places, need exactly 1")
            at = places[0]
        lines[at : at + len(hunk.old)] = hunk.new
        end = at + len(hunk.new)
        shift = end - (hunk.start - 1 + len(hunk.old))
    return newline.join(lines).encode("utf-8")


def apply_patches(read: Callable[[str], bytes], patches: Sequence[Path]) -> dict[str, bytes]:
    """Apply patches in order; read(path) gives a pristine file or raises KeyError. Returns the patched files only."""
    files: dict[str, bytes] = {}
    for patch in patches:
        for path, hunks in parse_patch(patch.read_bytes().decode("utf-8"), patch.name).items():
            where = f"{patch.name}: {path}"
            try:
                data = files[path] if path in files else read(path)
            except KeyError:
                raise PatchError(f"{where}: no such file in the source") from None
            files[path] = apply_hunks(data, hunks, where)
    return files


def tree_hash(files: Mapping[str, bytes]) -> str:
    """sha256 over path and sha256 of every file, sorted by path; line ends do not count."""
    total = hashlib.sha256()
    for path in sorted(files):
        digest = hashlib.sha256(files[path].replace(b"\r\n", b"\n")).hexdigest()
        total.update(f"{digest}  {path}\n".encode())
    return total.hexdigest()
