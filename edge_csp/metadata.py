"""What a GGUF file says about itself, read from its header alone.

The header is walked here rather than with the gguf package: every read is checked against the file size, so a
damaged or hostile file is named as such at once, and arrays nobody asks for (a vocabulary's merges, scores) are
skipped. gguf.GGUFReader takes seconds for the header of a model with 150k tokens. The tests compare both.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edge_csp.errors import ModelError

__all__ = ["GgufInfo", "check_pair", "describe", "find_mmproj", "read_info", "tensor_spans"]

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # GGUF value types
_STRING, _ARRAY = 8, 9
_KEPT_ARRAYS = re.compile(
    r"tokenizer\.ggml\.tokens|.*\.head_count(_kv)?|.*\.deepstack_mapping|.*\.(sliding_window_pattern|recurrent_layers)"
)

_TENSOR_TYPES: dict[int, tuple[str, int, int]] = {  # ggml type -> (name, values per block, bytes per block)
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
_FILE_TYPE_NAMES = (  # by general.file_type; "-" was never or is no longer used
    "F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - "
    "TQ1_0 TQ2_0 MXFP4_MOE NVFP4 Q1_0 Q2_0"
)
_FILE_TYPES = dict(enumerate(_FILE_TYPE_NAMES.split()))
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; llama.cpp aborts above it
# Sliding-window models whose files may not say which layers have a window: one of n has none, the last of n or (below)
# the first.
_FULL_EVERY = {
    **dict.fromkeys(("afmoe", "cohere2", "exaone-moe", "exaone4", "mellum", "muse-glimmer", "olmo2"), 4),
    **{"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "plamo3": 8},
    **dict.fromkeys(("cohere2moe", "laguna", "smallthinker"), 4),
}
_FULL_FIRST = {"cohere2moe", "laguna", "smallthinker"}
_INTERVAL_ARCHS = {"qwen3next", "qwen35", "qwen35moe"}  # 4, where the file does not say
_OTHER_KINDS = {"adapter": "a LoRA adapter", "imatrix": "an importance matrix", "model_extra": "a part of a model"}

# Where libmtmd looks up how many values per token a projector makes (clip_n_mmproj_embd): tensor and dimension, in ggml
# order. The metadata key projection_dim is no substitute: in LLaVA-1.5 files it is CLIP's own, 768 for 4096.
_PROJECTED: dict[str, tuple[str, int]] = {
    name: place
    for names, place in (
        ("mlp phi4 pixtral lightonocr dots_ocr dots3note_v muse-glimmer qwen2vl_merger", ("mm.2.weight", 1)),
        ("qwen2.5vl_merger qwen2.5o qwen3vl_merger ling3vl exaone4_5 youtuvl mimovl lfm2", ("mm.2.weight", 1)),
        ("kimivl paddleocr kimik25 yasa2 deepseek4v", ("mm.2.weight", 1)),
        ("janus_pro", ("mm.1.weight", 1)),
        ("idefics3 step3vl hunyuanvl llama4 deepseekocr deepseekocr2", ("mm.model.fc.weight", 1)),
        ("glm4v glm5v cogvlm minicpmv4_6", ("mm.down.weight", 1)),
        ("gemma3 gemma3nv", ("mm.input_projection.weight", 0)),
        ("gemma4v gemma4uv", ("mm.input_projection.weight", 1)),
        ("internvl nemotron_v2_vl", ("mm.model.mlp.3.weight", 1)),
        ("resampler", ("resampler.proj.weight", 0)),
        ("adapter", ("adapter.linear.dense_4h_to_h.weight", 1)),
        ("minimax_m3", ("mm.merger.fc2.bias", 0)),
        ("ldp", ("mm.model.mb_block.1.block.2.1.bias", 0)),
        ("ldpv2", ("mm.model.peg.0.bias", 0)),
    )
    for name in names.split()
}


@dataclass(frozen=True)
class GgufInfo:
    """What is known of a GGUF file. Numbers that a kind of file does not have are 0, texts are empty or None.

    For a text model the numbers describe the language model, for an mmproj the vision encoder.
    """

    path: Path
    """First part, if the model is split."""
    kind: Literal["text", "mmproj", "other"]
    kind_words: str
    """The kind in words: "a text model", "a LoRA adapter" …"""
    arch: str
    name: str
    n_layer: int
    n_embd: int
    n_embd_inp: int
    """Values per input embedding: n_embd, or a multiple for models with deepstack inputs."""
    n_head: int
    n_head_kv: tuple[int, ...]
    """KV heads [n_layer]; 0 for layers without attention."""
    n_head_kv_full: tuple[int, ...]
    """The same, and 0 for layers with a sliding window, which hold no more cells than that."""
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_vocab: int
    sliding_window: int
    quantisation: str
    """As llama.cpp names it, e.g. Q4_K_M."""
    size_bytes: int
    """All parts."""
    tensor_bytes: int
    """All parts, without the headers."""
    n_params: int
    """All parts."""
    n_part: int
    projector_type: str | None
    projection_dim: int | None
    """Values per picture token that an mmproj makes; None if not an mmproj, or the projector is not known here."""
    image_size: int
    """Pixels per side that the encoder was trained on."""
    patch_size: int
    has_vision: bool
    has_audio: bool
    chat_template: str | None
    bos_token: str
    eos_token: str

    @property
    def kv_values_per_cell(self) -> tuple[int, int]:
        """Values of K and of V that one cell holds over all layers (sliding-window layers counted like the others)."""
        heads = sum(self.n_head_kv)
        return heads * self.head_dim_k, heads * self.head_dim_v


def read_info(path: str | Path) -> GgufInfo:
    """Read the header of a GGUF file, and of all parts if it is the first part of a split model.

    Raises ModelError if the file is missing, no GGUF, damaged or cut off, of a version llama.cpp does not read, or if
    a part is missing or is not the first one.
    """
    return _info(Path(path), _read_headers(Path(path)))


def _read_headers(first: Path) -> list[_Header]:
    """Headers of all parts."""
    header = _read_header(first)
    n_part = header.number("split.count") or 1
    if n_part == 1:
        return [header]
    parts = _part_paths(first, n_part, header.number("split.no"))
    return [header, *(_read_header(part) for part in parts[1:])]


def tensor_spans(path: str | Path) -> dict[str, tuple[int, int, int]]:
    """Where every tensor of a model lies: name -> (part, first byte, byte behind its last one).

    Raises ModelError like read_info().
    """
    headers = _read_headers(Path(path))
    return {
        name: (number, header.data_start + tensor.offset, header.data_start + tensor.offset + tensor.n_bytes)
        for number, header in enumerate(headers)
        for name, tensor in header.tensors.items()
    }


def check_pair(text: GgufInfo, mmproj: GgufInfo) -> None:
    """Raise ModelError unless `text` is a text model and `mmproj` a vision projector that fits it."""
    if text.kind == "mmproj" and mmproj.kind == "text":
        raise ModelError(f"{text.path} is an mmproj and {mmproj.path} a text model: exchange them")
    if text.kind == "mmproj":
        raise ModelError(f"{text.path} is an mmproj, not a text model: give it as the mmproj of its model")
    if text.kind == "other":
        raise ModelError(f"{text.path} is {text.kind_words}, not a text model")
    if mmproj.kind != "mmproj":
        raise ModelError(f"{mmproj.path} is {mmproj.kind_words}, not an mmproj")
    if not mmproj.has_vision:
        raise ModelError(f"{mmproj.path} is an mmproj without a vision encoder")
    if mmproj.projection_dim is not None and mmproj.projection_dim != text.n_embd_inp:
        raise ModelError(
            f"{mmproj.path} makes embeddings of {mmproj.projection_dim} values, but {text.path} takes "
            f"{text.n_embd_inp}: it is the mmproj of another model"
        )


def find_mmproj(model_path: str | Path) -> Path | None:
    """Return the one `*mmproj*.gguf` beside a model, None if there is none; ModelError names them if there are more."""
    model = Path(model_path)
    try:
        beside = sorted(model.parent.iterdir())
    except OSError as error:
        raise ModelError(f"{model.parent}: cannot be listed ({error.strerror or error})") from error
    found = [
        file
        for file in beside
        if "mmproj" in file.name.lower() and file.suffix.lower() == ".gguf" and file.name != model.name
    ]
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8]) + (" ..." if len(found) > 8 else "")
        raise ModelError(f"{len(found)} mmproj files lie beside {model}, give one with --mmproj: {names}")
    return found[0] if found else None


def describe(info: GgufInfo) -> list[tuple[str, str]]:
    """Return what `edge-csp info` prints: (label, value) rows."""
    rows = [("file", str(info.path)), ("kind", f"{info.kind} ({info.kind_words})"), ("name", info.name)]
    rows += [("architecture", info.arch), ("quantisation", info.quantisation), ("size", _size(info.size_bytes))]
    rows += [("parameters", f"{info.n_params:,}"), ("parts", str(info.n_part) if info.n_part > 1 else "")]
    if info.n_layer:
        rows += [("layers", str(info.n_layer)), ("embedding", _count(info.n_embd, "value"))]
        rows += [("heads", str(info.n_head or ""))]
    if info.kind == "text":
        kv_heads = sorted(set(info.n_head_kv))
        rows += [("KV heads", " or ".join(map(str, kv_heads)) + (" per layer" if len(kv_heads) > 1 else ""))]
        rows += [("head size", f"K {info.head_dim_k}, V {info.head_dim_v}")]
        rows += [("trained context", f"{info.n_ctx_train} cells"), ("vocabulary", _count(info.n_vocab, "token"))]
        rows += [("sliding window", _count(info.sliding_window, "cell") if info.sliding_window else "")]
        per_cell = 2 * sum(info.kv_values_per_cell)
        rows += [("KV cache, f16", f"{per_cell} bytes per cell, {_size(4096 * per_cell)} for 4096 cells")]
        rows += [("chat template", "yes" if info.chat_template else "none: a plain one is used")]
    if info.kind == "mmproj":
        senses = [sense for sense, there in (("pictures", info.has_vision), ("audio", info.has_audio)) if there]
        rows += [("takes", " and ".join(senses)), ("projector", info.projector_type or "unknown")]
        rows += [("makes", f"embeddings of {info.projection_dim} values" if info.projection_dim else "unknown")]
        rows += [("picture size", f"{info.image_size} pixels, patches of {info.patch_size}" if info.image_size else "")]
    return [(label, "".join(c if c.isprintable() else "?" for c in value)) for label, value in rows if value]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _size(n_bytes: int) -> str:
    """Bytes in words; powers of 1024."""
    size, units = float(n_bytes), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{n_bytes} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


class _Tensor(NamedTuple):
    dims: tuple[int, ...]  # ggml order, fastest first
    type_id: int
    offset: int  # from the start of the data

    @property
    def n_bytes(self) -> int:
        """0 for types unknown here."""
        _, block, n_bytes = _TENSOR_TYPES.get(self.type_id, ("", 1, 0))
        return prod(self.dims) // block * n_bytes


@dataclass
class _Header:
    path: Path
    size_bytes: int
    values: dict[str, Any]
    tensors: dict[str, _Tensor]
    data_start: int = 0

    def number(self, key: str, default: int = 0) -> int:
        value = self.values.get(key)
        return value if isinstance(value, int) else default

    def text(self, key: str) -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else ""

    def per_layer(self, key: str, n_layer: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """Read a number that is given once for all layers, or once per layer."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) >= n_layer and all(isinstance(number, int) for number in value):
            return tuple(value[:n_layer])
        return (int(value),) * n_layer if isinstance(value, int) else default


def _read_header(path: Path) -> _Header:
    """Read everything before the tensor data, and check that the data is all there."""
    try:
        if path.is_dir():
            raise ModelError(f"{path} is a directory, not a GGUF file")
        if path.exists() and not path.is_file():
            raise ModelError(f"{path} is not a regular file")
        with path.open("rb") as file:
            size = path.stat().st_size
            magic = file.read(4)
            if magic != b"GGUF":
                raise ModelError(
                    f"{path} is not a GGUF file: it starts with {magic!r}" if magic else f"{path} is empty"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walker(path, data).header(size)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from error


class _Walker:
    """Walks through a GGUF header; ModelError when it leaves the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.pos = 4  # behind the magic

    def header(self, size_bytes: int) -> _Header:
        version = self.scalar("I")
        if version not in (2, 3):
            swapped = int.from_bytes(int(version).to_bytes(4, "little"), "big")
            words = "is big-endian" if swapped in (1, 2, 3) else f"has version {version}"
            raise ModelError(f"{self.path} {words}; only little-endian GGUF of version 2 and 3 is supported")
        n_tensor, n_value = self.scalar("Q"), self.scalar("Q")
        values = {}
        for _ in range(n_value):
            key = self.string()
            values[key] = self.value(self.scalar("I"), bool(_KEPT_ARRAYS.fullmatch(key)))
        tensors = {}
        for _ in range(n_tensor):
            name, n_dim = self.string(), self.scalar("I")
            if n_dim > 8:
                raise ModelError(f"{self.path} is damaged: tensor {name!r} has {n_dim} dimensions")
            dims = tuple(self.scalar("Q") for _ in range(n_dim))
            tensors[name] = _Tensor(dims, self.scalar("I"), self.scalar("Q"))
        header = _Header(self.path, size_bytes, values, tensors)
        self.check_data(header)
        return header

    def check_data(self, header: _Header) -> None:
        """Compare where the last tensor ends with the size of the file."""
        align = header.number("general.alignment", 32)
        if align < 1:
            raise ModelError(f"{self.path} is damaged: general.alignment is {align}")
        end = header.data_start = -(-self.pos // align) * align
        for tensor in header.tensors.values():
            end = max(end, header.data_start + tensor.offset + tensor.n_bytes)
        if header.tensors and end > header.size_bytes:
            raise ModelError(f"{self.path} is cut off: it has {header.size_bytes} bytes, its tensors need {end}")

    def value(self, type_id: int, keep: bool) -> Any:
        """Read one value; arrays only if `keep`, else None."""
        if type_id == _STRING:
            return self.string()
        if type_id != _ARRAY:
            return self.scalar(self.format(type_id))
        type_id, count = self.scalar("I"), self.scalar("Q")
        if type_id == _STRING:
            self.need(8 * count)
            if keep:
                return [self.string() for _ in range(count)]
            for _ in range(count):
                self.skip(self.scalar("Q"))
            return None
        code = self.format(type_id)
        n_bytes = count * struct.calcsize(f"<{code}")
        self.skip(n_bytes)
        return list(struct.unpack_from(f"<{count}{code}", self.data, self.pos - n_bytes)) if keep else None

    def scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self.skip(size)
        return struct.unpack_from(f"<{code}", self.data, self.pos - size)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        self.skip(length)
        return self.data[self.pos - length : self.pos].decode("utf-8", errors="replace")

    def format(self, type_id: int) -> str:
        if type_id not in _SCALARS:
            raise ModelError(f"{self.path} is damaged: value type {type_id} at byte {self.pos} is unknown")
        return _SCALARS[type_id]

    def skip(self, n_bytes: int) -> None:
        self.need(n_bytes)
        self.pos += n_bytes

    def need(self, n_bytes: int) -> None:
        if n_bytes > len(self.data) - self.pos:
            raise ModelError(
                f"{self.path} is cut off or damaged: {n_bytes} bytes are needed at byte {self.pos} of {len(self.data)}"
            )


def _part_paths(path: Path, n_part: int, index: int) -> list[Path]:
    """Return the paths of all parts of a split model, given its first one: NAME-00001-of-00003.gguf."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name, re.IGNORECASE)
    if match is None or int(match[3]) != n_part:
        raise ModelError(f"{path} is part {index + 1} of {n_part}, but is not named NAME-00001-of-{n_part:05}.gguf")
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, n_part + 1)]
    if index != 0:
        raise ModelError(f"{path} is part {index + 1} of {n_part}: give the first one, {parts[0].name}")
    for part in parts[1:]:
        if not part.is_file():
            raise ModelError(f"{path} has {n_part} parts, but {part.name} is missing")
    return [path, *parts[1:]]


def _info(path: Path, headers: list[_Header]) -> GgufInfo:
    header = headers[0]
    tensors = {name: tensor for part in headers for name, tensor in part.tensors.items()}
    arch = header.text("general.architecture")
    kind, kind_words = _kind(header, arch, bool(tensors))
    prefix = arch
    if kind == "mmproj":
        prefix = "clip.vision" if header.values.get("clip.has_vision_encoder") else "clip.audio"
    n_layer = header.number(f"{prefix}.block_count")
    if not (1 if kind == "text" else 0) <= n_layer <= _MAX_LAYERS:
        raise ModelError(f"{path} is damaged: it has {n_layer} layers, the limits are 1 and {_MAX_LAYERS}")
    n_embd = header.number(f"{prefix}.embedding_length")
    n_head = header.per_layer(f"{prefix}.attention.head_count", n_layer, (0,) * n_layer)
    head_dim = n_embd // max(n_head) if max(n_head, default=0) else 0
    tokens = header.values.get("tokenizer.ggml.tokens") or []
    projector = header.text("clip.vision.projector_type") or header.text("clip.projector_type") or None
    n_head_kv = header.per_layer(f"{prefix}.attention.head_count_kv", n_layer, n_head)
    n_head_kv = _where_not(_recurrent_layers(header, arch, n_layer), n_head_kv)
    return GgufInfo(
        path=path,
        kind=kind,
        kind_words=kind_words,
        arch=arch,
        name=header.text("general.name"),
        n_layer=n_layer,
        n_embd=n_embd,
        n_embd_inp=n_embd * (1 + _n_deepstack(header, arch)),
        n_head=max(n_head, default=0),
        n_head_kv=n_head_kv,
        n_head_kv_full=_where_not(_window_layers(header, arch, n_layer), n_head_kv),
        head_dim_k=header.number(f"{prefix}.attention.key_length", head_dim),
        head_dim_v=header.number(f"{prefix}.attention.value_length", head_dim),
        n_ctx_train=header.number(f"{prefix}.context_length"),
        n_vocab=len(tokens) or header.number(f"{prefix}.vocab_size"),
        sliding_window=header.number(f"{prefix}.attention.sliding_window"),
        quantisation=_quantisation(header, tensors),
        size_bytes=sum(part.size_bytes for part in headers),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
        n_params=sum(prod(tensor.dims) for tensor in tensors.values()),
        n_part=len(headers),
        projector_type=projector,
        projection_dim=_projection_dim(projector, tensors) if kind == "mmproj" else None,
        image_size=header.number("clip.vision.image_size"),
        patch_size=header.number("clip.vision.patch_size"),
        has_vision=bool(header.values.get("clip.has_vision_encoder")),
        has_audio=bool(header.values.get("clip.has_audio_encoder")),
        chat_template=header.text("tokenizer.chat_template") or None,
        bos_token=_token(header, tokens, "bos"),
        eos_token=_token(header, tokens, "eos"),
    )


def _kind(header: _Header, arch: str, has_tensors: bool) -> tuple[Literal["text", "mmproj", "other"], str]:
    general_type = header.text("general.type")
    if arch == "clip" or general_type == "mmproj":
        return "mmproj", "a vision or audio projector of a text model"
    if general_type not in ("", "model"):
        return "other", _OTHER_KINDS.get(general_type, f"a GGUF file of type {general_type}")
    if not has_tensors:
        return "other", "a GGUF file without weights (a vocabulary only)"
    if not arch or f"{arch}.block_count" not in header.values:
        return "other", f"a GGUF file without a language model (architecture {arch or 'unknown'})"
    if header.values.get(f"{arch}.attention.causal") is False:
        return "other", "an encoder for embeddings"
    return "text", "a text model"


def _where_not(flags: list[bool], heads: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if flag else n for flag, n in zip(flags, heads, strict=True))


def _recurrent_layers(header: _Header, arch: str, n_layer: int) -> list[bool]:
    """Which layers of a hybrid model hold a state instead of cells, where it is not said by their KV heads."""
    recurrent = header.values.get(f"{arch}.attention.recurrent_layers")
    if isinstance(recurrent, list) and len(recurrent) >= n_layer:
        return [bool(flag) for flag in recurrent[:n_layer]]
    interval = header.number(f"{arch}.full_attention_interval", 4 if arch in _INTERVAL_ARCHS else 1)
    return [(il + 1) % max(interval, 1) != 0 for il in range(n_layer)]


def _window_layers(header: _Header, arch: str, n_layer: int) -> list[bool]:
    """Which layers look back over a sliding window only."""
    pattern = header.values.get(f"{arch}.attention.sliding_window_pattern")
    if header.number(f"{arch}.attention.sliding_window") < 1:
        return [False] * n_layer
    if isinstance(pattern, list) and len(pattern) >= n_layer:
        return [bool(flag) for flag in pattern[:n_layer]]
    every = pattern if isinstance(pattern, int) else _FULL_EVERY.get(arch, 1)
    rest = 0 if arch in _FULL_FIRST else every - 1
    return [every < 1 or il % every != rest for il in range(n_layer)]


def _n_deepstack(header: _Header, arch: str) -> int:
    mapping = header.values.get(f"{arch}.deepstack_mapping")
    if isinstance(mapping, list):
        return len({index for index in mapping if index >= 0})
    return header.number(f"{arch}.n_deepstack_layers")


def _projection_dim(projector: str | None, tensors: dict[str, _Tensor]) -> int | None:
    name, dim = _PROJECTED.get(projector or "", ("", 0))
    if projector == "mlp" and "mm.3.bias" in tensors:  # a norm behind the projection, as in Yi-VL
        name, dim = "mm.3.bias", 0
    tensor = tensors.get(name)
    if tensor is None or dim >= len(tensor.dims):
        return None
    n_deepstack = 0
    if projector == "qwen3vl_merger":
        n_deepstack = sum(bool(re.fullmatch(r"v\.deepstack\.\d+\.fc1\.weight", other)) for other in tensors)
    return tensor.dims[dim] * (1 + n_deepstack)


def _quantisation(header: _Header, tensors: dict[str, _Tensor]) -> str:
    """Name the file type; if the file does not, the tensor type of most parameters."""
    name = _FILE_TYPES.get(header.number("general.file_type", -1) & ~1024, "-")  # 1024: guessed
    if name != "-" and "general.file_type" in header.values:
        return name
    params: dict[int, int] = {}
    for tensor in tensors.values():
        params[tensor.type_id] = params.get(tensor.type_id, 0) + prod(tensor.dims)
    if not params:
        return "none"
    most = max(params, key=lambda type_id: params[type_id])
    return _TENSOR_TYPES[most][0] if most in _TENSOR_TYPES else f"ggml type {most}"


def _token(header: _Header, tokens: list[str], which: str) -> str:
    index = header.number(f"tokenizer.ggml.{which}_token_id", -1)
    return tokens[index] if 0 <= index < len(tokens) else ""
