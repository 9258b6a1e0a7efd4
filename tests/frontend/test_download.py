"""Models from the hub: which files are chosen, what happens offline. No test touches the network."""

import os
import subprocess
import sys
from errno import ENOSPC
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_csp.download import Choice, choose_files, resolve_hf
from edge_csp.errors import DownloadError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = [
    ".gitattributes",
    "README.md",
    "model-F16.gguf",
    "model-Q4_K_M.gguf",
    "model-q8_0.gguf",
    "mmproj-model-Q8_0.gguf",
    "mmproj-model-f16.gguf",
    "imatrix.gguf",
]


class GatedRepoError(Exception):
    pass


class RepositoryNotFoundError(Exception):
    pass


class HFValidationError(ValueError):
    pass


ERRORS = SimpleNamespace(
    GatedRepoError=GatedRepoError, RepositoryNotFoundError=RepositoryNotFoundError, HFValidationError=HFValidationError
)


class FakeHub:
    """Stands in for huggingface_hub: lists `files`, "downloads" into a folder, or raises `error`."""

    utils = ERRORS

    def __init__(self, cache: Path, files: list[str], error: Exception | None = None, offline: bool = False) -> None:
        self.constants = SimpleNamespace(HF_HUB_CACHE=str(cache), HF_HUB_OFFLINE=offline)
        self.files = files
        self.error = error
        self.fetched: list[str] = []

    def HfApi(self) -> "FakeHub":
        return self

    def model_info(self, repo: str, *, timeout: float) -> SimpleNamespace:
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files])

    def hf_hub_download(self, repo: str, file: str) -> str:
        self.fetched.append(file)
        return f"/cache/{repo}/{file}"


def fake_cache(cache: Path, repo: str, files: list[str]) -> Path:
    """Lay out a repository as huggingface_hub caches it; return the snapshot folder."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(files):
        (folder / "blobs" / str(number)).write_text(file)
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            (snapshot / file).symlink_to(folder / "blobs" / str(number))
        except OSError:  # Windows without the right to make links: huggingface_hub copies as well
            (snapshot / file).write_text(file)
    return snapshot


@pytest.mark.parametrize(
    ("files", "quant", "model"),
    [
        (FILES, None, "model-Q4_K_M.gguf"),
        (FILES, "F16", "model-F16.gguf"),
        (FILES, "f16", "model-F16.gguf"),
        (FILES, "Q8_0", "model-q8_0.gguf"),
        (["a-F16.gguf", "a-Q8_0.gguf"], None, "a-Q8_0.gguf"),
        (["mmproj-a.gguf", "b-IQ2_S.gguf", "a-F16.gguf"], None, "b-IQ2_S.gguf"),
        (["Q4_K_M/a.gguf", "a.Q4_K_M.gguf"], None, "a.Q4_K_M.gguf"),
        (["a-Q4_K_M-v2.gguf"], "q4_k_m", "a-Q4_K_M-v2.gguf"),
    ],
)
def test_choice_of_the_model(files: list[str], quant: str | None, model: str) -> None:
    assert choose_files(files, "user/repo", quant, mmproj=False) == Choice((model,), None)


@pytest.mark.parametrize(
    ("model", "mmprojs", "chosen"),
    [
        ("a-Q4_K_M.gguf", ["mmproj-a-f16.gguf", "mmproj-a-Q8_0.gguf"], "mmproj-a-Q8_0.gguf"),  # closest to 4 bits
        ("a-F16.gguf", ["mmproj-a-Q8_0.gguf", "mmproj-a-f16.gguf"], "mmproj-a-f16.gguf"),
        ("a-F16.gguf", ["mmproj-a-BF16.gguf", "mmproj-a-F16.gguf"], "mmproj-a-BF16.gguf"),  # as close: the first
        ("q/a-F16.gguf", ["mmproj-F16.gguf", "q/mmproj-Q8_0.gguf"], "q/mmproj-Q8_0.gguf"),  # nearer folder
        ("q/a-F16.gguf", ["r/mmproj-F16.gguf"], None),  # of another model
        ("a-F16.gguf", [], None),
        ("a-F16.gguf", ["mmproj-model.gguf"], "mmproj-model.gguf"),
    ],
)
def test_choice_of_the_mmproj(model: str, mmprojs: list[str], chosen: str | None) -> None:
    assert choose_files([model, *mmprojs], "user/repo").mmproj == chosen


def test_split_models() -> None:
    parts = [f"Q4_K_M/big-Q4_K_M-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    files = ["mmproj-big-f16.gguf", *reversed(parts), "big-Q8_0.gguf"]
    assert choose_files(files, "user/repo") == Choice(tuple(parts), "mmproj-big-f16.gguf")


def test_nothing_to_choose(refuses) -> None:
    with refuses(DownloadError, "user/repo", "Q5_K_M", "model-Q4_K_M.gguf"):
        choose_files(FILES, "user/repo", "Q5_K_M")
    with refuses(DownloadError, "user/repo", "no GGUF model", "none"):
        choose_files(["README.md", "model.safetensors"], "user/repo")
    with refuses(DownloadError, "user/repo", 2, "missing", "big-00002-of-00002.gguf"):
        choose_files(["big-00001-of-00002.gguf"], "user/repo")
    with refuses(DownloadError, "user/repo", "..."):
        choose_files([f"a-{index}.gguf" for index in range(99)], "user/repo", "Q9")


@pytest.mark.parametrize(
    "spec", ["", "repo", "user/", "/repo", "a/b/c", "user/repo:", "user/repo:a:b", "../x y", "a/b\n"]
)
def test_malformed_specs(spec: str, tmp_path: Path, refuses) -> None:
    with refuses(DownloadError, "user/repo:quant"):
        resolve_hf(spec, hub=FakeHub(tmp_path, FILES))


def test_download(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, FILES)
    assert resolve_hf("user/repo", hub=hub) == (
        Path("/cache/user/repo/model-Q4_K_M.gguf"),
        Path("/cache/user/repo/mmproj-model-Q8_0.gguf"),
    )
    assert hub.fetched == ["model-Q4_K_M.gguf", "mmproj-model-Q8_0.gguf"]
    assert resolve_hf("user/repo:f16", mmproj=False, hub=hub) == (Path("/cache/user/repo/model-F16.gguf"), None)


def test_download_of_all_parts(tmp_path: Path) -> None:
    parts = [f"big-Q4_K_M-{number:05}-of-00002.gguf" for number in (1, 2)]
    hub = FakeHub(tmp_path, parts)
    assert resolve_hf("user/repo", hub=hub) == (Path(f"/cache/user/repo/{parts[0]}"), None)
    assert hub.fetched == parts


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403\n\nlong text"), ("protected", "HF_TOKEN")),
        (RepositoryNotFoundError("404"), ("not on the hub", "HF_TOKEN")),
        (HFValidationError("no '--'"), ("not the name of a repository", "no '--'")),
        (OSError(ENOSPC, "No space left on device"), ("No space left on device",)),
    ],
)
def test_final_answers_of_the_hub(error: Exception, words: tuple[str, ...], tmp_path: Path, refuses) -> None:
    fake_cache(tmp_path, "user/repo", FILES)  # must not be used
    with refuses(DownloadError, "user/repo", *words):
        resolve_hf("user/repo", hub=FakeHub(tmp_path, FILES, error))


def test_without_network_the_cache_is_used(tmp_path: Path, refuses) -> None:
    hub = FakeHub(tmp_path, FILES, ConnectionError("no route\nto host"))
    with refuses(DownloadError, "user/repo", "not in the cache", "no route", "-m"):
        resolve_hf("user/repo", hub=hub)
    snapshot = fake_cache(tmp_path, "user/repo", FILES)
    assert resolve_hf("user/repo:q8_0", hub=hub)[0] == snapshot / "model-q8_0.gguf"


def test_offline_the_hub_is_not_asked(tmp_path: Path, refuses) -> None:
    hub = FakeHub(tmp_path, FILES, AssertionError("asked"), offline=True)
    snapshot = fake_cache(tmp_path, "user/repo", ["Q4_K_M/a-Q4_K_M.gguf", "mmproj-a-f16.gguf"])
    assert resolve_hf("user/repo", hub=hub) == (snapshot / "Q4_K_M/a-Q4_K_M.gguf", snapshot / "mmproj-a-f16.gguf")
    with refuses(DownloadError, "user/repo", "Q8_0", "in the cache", "HF_HUB_OFFLINE", "a-Q4_K_M.gguf"):
        resolve_hf("user/repo:Q8_0", hub=hub)
    with refuses(DownloadError, "user/unknown", "not in the cache", "HF_HUB_OFFLINE", "-m", tmp_path):
        resolve_hf("user/unknown", hub=hub)


def test_files_whose_download_was_cut_are_not_used(tmp_path: Path, refuses) -> None:
    snapshot = fake_cache(tmp_path, "user/repo", FILES)
    model = snapshot / "model-Q4_K_M.gguf"
    if not model.is_symlink():
        pytest.skip("no links here")
    model.resolve().unlink()
    with refuses(DownloadError, "user/repo", "Q4_K_M", "in the cache"):
        resolve_hf("user/repo:Q4_K_M", hub=FakeHub(tmp_path, FILES, offline=True))


def in_a_new_process(cache: Path, spec: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run resolve_hf with the real huggingface_hub."""
    code = "import sys; from edge_csp.download import resolve_hf; print(*resolve_hf(sys.argv[1]), sep='\\n')"
    root = Path(__file__).parents[2]
    env = os.environ | {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(root), "NO_PROXY": "*"} | environment
    command = [sys.executable, "-c", code, spec]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_real_hub_offline(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = fake_cache(tmp_path, "user/repo", FILES)
    found = in_a_new_process(tmp_path, "user/repo", HF_HUB_OFFLINE="1")
    assert found.stdout.split() == [str(snapshot / "model-Q4_K_M.gguf"), str(snapshot / "mmproj-model-Q8_0.gguf")]
    unknown = in_a_new_process(tmp_path, "user/unknown", HF_HUB_OFFLINE="1")
    assert unknown.returncode != 0
    last = unknown.stderr.strip().splitlines()[-1]
    assert last.startswith("edge_csp.errors.DownloadError: user/unknown is not in the cache, and HF_HUB_OFFLINE is set")


def test_real_hub_out_of_reach(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = fake_cache(tmp_path, "user/repo", FILES)
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # a port where nobody listens
    found = in_a_new_process(tmp_path, "user/repo", **nowhere)
    assert found.stdout.split()[0] == str(snapshot / "model-Q4_K_M.gguf")
    unknown = in_a_new_process(tmp_path, "user/unknown", **nowhere)
    last = unknown.stderr.strip().splitlines()[-1]
    assert last.startswith("edge_csp.errors.DownloadError: user/unknown is not in the cache, and the download failed (")


def test_hub_is_not_imported_early() -> None:
    code = "import sys, edge_csp.download; print('huggingface_hub' in sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "False"
