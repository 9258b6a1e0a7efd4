"""Put the pinned upstream source, patched, into a build directory.

    python prepare.py source DIR               source of the fork
    python prepare.py source DIR --pristine    source of upstream, to write patches against
    python prepare.py hash [--record]          hash of the patched files; --record writes patches/tree.sha256

The source is the sdist of llama-cpp-python (it contains llama.cpp): fetched with pip, so that the user's index settings
apply, or taken from --upstream or the environment variable EDGE_CSP_UPSTREAM (the sdist, or its extracted folder).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from apply_patches import PatchError, apply_patches, tree_hash

VERSION = "0.3.36+csp.1"
UPSTREAM_VERSION = "0.3.36"
UPSTREAM_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SDIST = f"llama_cpp_python-{UPSTREAM_VERSION}.tar.gz"

HERE = Path(__file__).resolve().parent
PATCHES = HERE / "patches"
LLAMA = "vendor/llama.cpp/"
# What a build needs. The rest (models, docs, web UI: 70 MB) has paths too long for a build directory on Windows.
PARTS = ("CMakeLists.txt", "LICENSE", "licenses/", "cmake/", "include/", "src/", "ggml/", "vendor/", "tools/mtmd/")
WANTED = ("LICENSE.md", "llama_cpp/", *(LLAMA + part for part in PARTS))


class SourceError(Exception):
    """One line that tells what is wrong with the source package."""


def find_source(upstream: str | None, download_dir: Path) -> Path:
    """The checked sdist, or the folder the user gave; downloads into download_dir if nothing is given."""
    if upstream:
        source = Path(upstream).expanduser().absolute()
        if not source.exists():
            raise SourceError(f"{source}: no such file or folder (EDGE_CSP_UPSTREAM)")
        if source.is_dir():  # the user's own tree: no hash, but the version must fit and the patches apply strictly
            return source
    else:
        source = download_dir / SDIST
        if not source.exists():
            fetch(source)
    with source.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != UPSTREAM_SHA256:
        raise SourceError(f"{source}: wrong sha256, expected {UPSTREAM_SHA256}, got {digest.hexdigest()}")
    return source


def fetch(target: Path) -> None:
    """Download the sdist.

    The hash stands in the requirement: pip reads the metadata of an sdist by running its build backend, and must not
    run anything before the hash is checked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        requirement = Path(tmp, "requirement.txt")
        requirement.write_text(f"llama-cpp-python=={UPSTREAM_VERSION} --hash=sha256:{UPSTREAM_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        command += ["--require-hashes", "--dest", tmp, "--requirement", str(requirement)]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if pip.returncode != 0 or not Path(tmp, SDIST).exists():
            reasons = [
                line for line in pip.stdout.splitlines() if line.startswith("ERROR: ")
            ] or pip.stdout.splitlines()
            reason = reasons[-1] if reasons else f"exit status {pip.returncode}"
            raise SourceError(f"pip download of {SDIST} failed: {reason} (offline: set EDGE_CSP_UPSTREAM to a copy)")
        os.replace(Path(tmp, SDIST), target)


def read_source(source: Path) -> dict[str, bytes]:
    """The wanted files by path, from an sdist or a folder."""
    found = _read_folder(source) if source.is_dir() else _read_sdist(source)
    files = {path: data for path, data in found if path.startswith(WANTED)}
    if LLAMA + "CMakeLists.txt" not in files or "llama_cpp/__init__.py" not in files:
        raise SourceError(f"{source}: not the source of llama-cpp-python with {LLAMA} inside")
    return files


def _read_sdist(source: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(source, "r:gz") as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if path.startswith(WANTED) and (file := archive.extractfile(member)) is not None:
                yield path, file.read()


def _read_folder(source: Path) -> Iterator[tuple[str, bytes]]:
    for prefix in WANTED:
        paths = source.joinpath(prefix).rglob("*") if prefix.endswith("/") else [source / prefix]
        for path in paths:
            if path.is_file() and path.suffix not in (".pyc", ".so", ".dylib", ".dll"):
                yield path.relative_to(source).as_posix(), path.read_bytes()


def set_version(init: bytes, source: Path) -> bytes:
    """llama_cpp.__version__ tells the fork from upstream, as the distribution's version does."""
    old = f'__version__ = "{UPSTREAM_VERSION}"'.encode()
    if init.count(old) != 1:
        raise SourceError(f"{source}: llama_cpp/__init__.py does not say {old.decode()}")
    return init.replace(old, f'__version__ = "{VERSION}"'.encode())


def patched_files(files: dict[str, bytes]) -> dict[str, bytes]:
    """Result of patches/*.patch: paths relative to llama.cpp, patched files only."""
    return apply_patches(lambda path: files[LLAMA + path], sorted(PATCHES.glob("*.patch")))


def sync(files: dict[str, bytes], target: Path) -> None:
    """Make the folder hold exactly these files. Equal files are left alone, so that they are not compiled again."""
    for path in [path for path in target.rglob("*") if path.is_file()]:
        if path.relative_to(target).as_posix() not in files:
            path.unlink()
    for name, data in files.items():
        path = target / name
        if not path.exists() or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def prepare(target: Path, upstream: str | None, *, pristine: bool = False) -> None:
    """Fill target/ with the source. A stamp beside it remembers what it was made of."""
    source = find_source(upstream, target.parent)
    inputs = [Path(__file__), HERE / "apply_patches.py", *sorted(PATCHES.glob("*.patch"))]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in inputs]
    stamp = target.with_name(target.name + ".stamp")
    state = "\n".join([UPSTREAM_SHA256, f"pristine={pristine}", *digests, ""])
    if source.is_file() and target.is_dir() and stamp.exists() and stamp.read_text() == state:
        return
    stamp.unlink(missing_ok=True)
    files = read_source(source)
    init = "llama_cpp/__init__.py"
    fork_init = set_version(files[init], source)
    if not pristine:
        files[init] = fork_init
        files.update({LLAMA + path: data for path, data in patched_files(files).items()})
    sync(files, target)
    stamp.write_text(state)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", default=os.environ.get("EDGE_CSP_UPSTREAM"), help="local sdist or folder")
    commands = parser.add_subparsers(dest="command", required=True)
    source = commands.add_parser("source")
    source.add_argument("dir", type=Path)
    source.add_argument("--pristine", action="store_true")
    commands.add_parser("hash").add_argument("--record", action="store_true")
    args = parser.parse_args()
    try:
        if args.command == "source":
            prepare(args.dir.absolute(), args.upstream, pristine=args.pristine)
        else:
            with tempfile.TemporaryDirectory() as tmp:
                digest = tree_hash(patched_files(read_source(find_source(args.upstream, Path(tmp)))))
            print(digest)
            if args.record:
                (PATCHES / "tree.sha256").write_text(digest + "\n", newline="\n")
    except (PatchError, SourceError, OSError, tarfile.TarError, UnicodeDecodeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
