"""Models from the Hugging Face hub: `user/repo[:quant]` as in llama.cpp's -hf, through huggingface_hub.

Cache, token (HF_TOKEN) and offline switch (HF_HUB_OFFLINE) are huggingface_hub's own, shared with its other users.
Which files are chosen follows llama.cpp's common/download.cpp.
"""

import re
from collections.abc import Sequence
from errno import EACCES, ENOSPC, EROFS
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

from edge_csp.errors import DownloadError

__all__ = ["Choice", "choose_files", "resolve_hf"]

_TIMEOUT = 10.0  # seconds, then the hub counts as out of reach
_SPEC = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", re.ASCII)
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
_NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")  # sidecars of a model, in its repository
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.IGNORECASE)
_QUANT = re.compile(r"[-.]([A-Z0-9_]+)$", re.IGNORECASE)


class Choice(NamedTuple):
    """Files of a repository, as paths inside it."""

    model: tuple[str, ...]
    """All parts, the first one first."""
    mmproj: str | None


def resolve_hf(spec: str, *, mmproj: bool = True, hub: Any = None) -> tuple[Path, Path | None]:
    """Return the local paths of a model and of its mmproj (None if there is none), downloading what is missing.

    spec: "user/repo" or "user/repo:quant". Without a quant: Q4_K_M, else Q8_0, else the first model of the repository.
    All parts of a split model are fetched; the path is the one of the first part. mmproj: False leaves it out.
    hub: stands in for the huggingface_hub module.

    Offline, or when the hub cannot be reached, the newest cached version is used as far as it was downloaded before.

    Raises DownloadError for a malformed spec, an unknown or protected repository, a quant that is not there, a failed
    download, and offline for anything that is not in the cache.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise DownloadError(f"{spec!r} is not of the form user/repo or user/repo:quant")
    repo, quant = match[1], match[2]
    if hub is None:
        import huggingface_hub.constants  # slow to import, and rarely needed
        import huggingface_hub.utils

        hub = huggingface_hub
    cache = Path(hub.constants.HF_HUB_CACHE)
    offline = bool(hub.constants.HF_HUB_OFFLINE)
    problem = f"HF_HUB_OFFLINE is set: unset it once to download, or give a file with -m (cache: {cache})"
    if not offline:
        try:
            there = hub.HfApi().model_info(repo, timeout=_TIMEOUT).siblings  # list_repo_files retries for half a minute
            files = [file.rfilename for file in there or ()]
            return _download(hub, repo, choose_files(files, repo, quant, mmproj=mmproj))
        except DownloadError:
            raise
        except Exception as error:  # whatever the HTTP library of the day raises
            _refuse_if_final(hub, repo, error)
            problem = f"the download failed ({_first_line(error)}): try again, or give a file with -m"
    snapshot = _cached_snapshot(cache, repo)
    if snapshot is None:
        raise DownloadError(f"{repo} is not in the cache, and {problem}")
    files = sorted(file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file())
    try:
        choice = choose_files(files, repo, quant, mmproj=mmproj)
    except DownloadError as error:
        raise DownloadError(f"in the cache: {error}; {problem}") from None
    return snapshot / choice.model[0], snapshot / choice.mmproj if choice.mmproj else None


def choose_files(files: Sequence[str], repo: str, quant: str | None = None, *, mmproj: bool = True) -> Choice:
    """Choose the model of a quantisation, and the mmproj next to it, from the files of a repository.

    The mmproj is the one that shares most folders with the model, then the one whose number of bits is closest.

    Raises DownloadError naming the GGUF files there are if none fits, or if a part is missing.
    """
    ggufs = [file for file in files if file.lower().endswith(".gguf")]
    models = [file for file in ggufs if _is_first_model_part(file)]
    tags = [quant] if quant else list(_DEFAULT_QUANTS)
    wanted = [file for tag in tags for file in models if re.search(re.escape(tag) + "[.-]", file, re.IGNORECASE)]
    if not quant:
        wanted += models
    if not wanted:
        there = ", ".join(ggufs[:12]) + (" ..." if len(ggufs) > 12 else "")
        what = f"model of quantisation {quant}" if quant else "GGUF model"
        raise DownloadError(f"{repo} has no {what}; its GGUF files: {there or 'none'}")
    model = wanted[0]
    siblings = [file for file in ggufs if "mmproj" in PurePosixPath(file).name.lower()] if mmproj else []
    return Choice(_parts(model, ggufs, repo), _closest(siblings, model))


def _is_first_model_part(file: str) -> bool:
    path = PurePosixPath(file)
    part = _PART.fullmatch(path.stem)
    return not any(word in path.name.lower() for word in _NOT_MODELS) and (part is None or int(part[2]) == 1)


def _parts(model: str, files: Sequence[str], repo: str) -> tuple[str, ...]:
    """Return all parts of the model whose first part is `model`."""
    path = PurePosixPath(model)
    part = _PART.fullmatch(path.stem)
    if part is None:
        return (model,)
    count = int(part[3])
    parts = [str(path.with_name(f"{part[1]}-{number:05}-of-{part[3]}{path.suffix}")) for number in range(1, count + 1)]
    missing = [name for name in parts if name not in files]
    if missing:
        raise DownloadError(f"{repo}: {model} has {count} parts, {len(missing)} are missing: {missing[0]}")
    return tuple(parts)


def _closest(siblings: Sequence[str], model: str) -> str | None:
    """Return the sibling in the deepest folder above `model`, then with the closest number of bits, then the first."""
    folders = PurePosixPath(model).parents
    near = [file for file in siblings if PurePosixPath(file).parent in folders]
    bits = _bits(model)
    return min(near, key=lambda file: (-len(PurePosixPath(file).parts), abs(_bits(file) - bits)), default=None)


def _bits(file: str) -> int:
    """Return the number in a file's quantisation: 4 for Q4_K_M, 16 for F16 and BF16, 0 if there is none."""
    stem = PurePosixPath(file).stem
    part = _PART.fullmatch(stem)
    quant = _QUANT.search(part[1] if part else stem)
    digits = re.search(r"\d+", quant[1]) if quant else None
    return int(digits[0]) if digits else 0


def _download(hub: Any, repo: str, choice: Choice) -> tuple[Path, Path | None]:
    """Fetch the files (a file in the cache is only checked for a newer version)."""
    paths = [Path(hub.hf_hub_download(repo, file)) for file in choice.model]
    return paths[0], Path(hub.hf_hub_download(repo, choice.mmproj)) if choice.mmproj else None


def _refuse_if_final(hub: Any, repo: str, error: Exception) -> None:
    """Raise DownloadError if the hub's answer leaves nothing to hope for from the cache."""
    errors = hub.utils
    if isinstance(error, errors.GatedRepoError):
        _fail(f"{repo} is protected: accept its licence on the hub, and set HF_TOKEN", error)
    if isinstance(error, errors.RepositoryNotFoundError):
        _fail(f"{repo} is not on the hub, or is private: check the name, or set HF_TOKEN", error)
    if isinstance(error, errors.HFValidationError):
        _fail(f"{repo!r} is not the name of a repository ({_first_line(error)})", error)
    if isinstance(error, OSError) and error.errno in (ENOSPC, EACCES, EROFS):
        _fail(f"{repo}: the download failed ({error.strerror or error})", error)


def _fail(message: str, error: Exception) -> NoReturn:
    raise DownloadError(message) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _cached_snapshot(cache: Path, repo: str) -> Path | None:
    """Return the folder of the newest cached version of a repository."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None
