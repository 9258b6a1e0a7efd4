"""The random models of upstream's own architecture test, written by that test.

It is compiled from the source package and never copied into this repository. `shim/` stands in for upstream's `common`
library, of which it needs little.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import llama_cpp

SHIM = Path(__file__).parent / "shim"
LLAMA = "vendor/llama.cpp/"
TEST, NAMES = LLAMA + "tests/test-llama-archs.cpp", LLAMA + "src/llama-arch.cpp"
SOURCES = [TEST, NAMES, LLAMA + "src/llama-arch.h", LLAMA + "src/llama-model-saver.h"]


class CannotGenerate(Exception):
    """One line that tells what this machine lacks."""


def generate_models(folder: Path) -> tuple[list[Path], list[str]]:
    """Fill the folder with about 130 GGUF files (900 MB): their paths, and the architectures without a file."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise CannotGenerate("there is no C++ compiler")
    upstream = os.environ.get("EDGE_CSP_UPSTREAM")
    if not upstream:
        raise CannotGenerate("EDGE_CSP_UPSTREAM does not name the source package of llama-cpp-python")
    _unpack(Path(upstream), folder)

    generator = folder / "test-llama-archs"
    package = Path(llama_cpp.__file__).parent
    command = [
        *compiler,
        "-std=c++17",
        f"-I{SHIM}",
        f"-I{package / 'include'}",
        str(folder / TEST),
        "-o",
        str(generator),
    ]
    command += [f"-L{package / 'lib'}", f"-Wl,-rpath,{package / 'lib'}", "-lllama", "-lggml", "-lggml-base"]
    subprocess.run(command, check=True)

    target = folder / "models"
    target.mkdir()
    subprocess.run([generator, "--seed", "1", "--out", target], check=True, stdout=subprocess.DEVNULL)
    models = sorted(target.glob("*.gguf"))
    names = re.findall(r'\{ LLM_ARCH_\w+, +"([\w.-]+)" +\}', (folder / NAMES).read_text())
    return models, sorted(set(names) - {path.stem.rpartition("-")[0] for path in models})


def _unpack(upstream: Path, folder: Path) -> None:
    """SOURCES, from the sdist or its extracted folder."""
    files: dict[str, bytes] = {}
    if upstream.is_dir():
        files = {name: (upstream / name).read_bytes() for name in SOURCES}
    else:
        with tarfile.open(upstream, "r|gz") as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if name in SOURCES and (file := archive.extractfile(member)) is not None:
                    files[name] = file.read()
    for name in SOURCES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
