"""A vision-language model: a GGUF text model and the mmproj that reads its pictures, loaded by llama.cpp and libmtmd.

`VisionModel` turns text and pictures into parts (tokens, picture cells) and pictures into embeddings. It keeps no
conversation: see context.py and session.py.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_csp import native
from edge_csp.embeddings import EmbeddingCache
from edge_csp.errors import ModelError
from edge_csp.images import MEDIA_MARKER, Picture
from edge_csp.metadata import GgufInfo, check_pair, find_mmproj, read_info
from edge_csp.rpc import Servers

Progress = Callable[[str, float], None]
"""Called with what is done ("load", "encode", "prefill") and the part that is done, 0 .. 1."""

EMBEDDING_CACHE_BYTES = 256 << 20
"""Embeddings that stay in memory, in front of the cache on disk."""
_KEY_VERSION = 1  # of what identifies an entry of the cache on disk


@dataclass(frozen=True)
class TokenPart:
    """A run of text tokens."""

    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PicturePart:
    """Cells that a picture fills. Large pictures of some models are cut into several parts (tiles).

    sha256, index: which picture, and which of its parts; parts with the same both have the same embeddings.
    n_cell, n_pos: cells and positions it takes (they differ for M-RoPE models).
    size: (width, height) in pixels that the encoder gets, (0, 0) if libmtmd does not tell.
    """

    sha256: str
    index: int
    n_cell: int
    n_pos: int
    name: str = field(compare=False)
    chunk: Any = field(compare=False, repr=False)  # mtmd_input_chunk *, owned
    size: tuple[int, int] = field(compare=False, default=(0, 0))


Part = TokenPart | PicturePart


class VisionModel:
    """An opened model; a context manager. Not thread-safe."""

    def __init__(
        self,
        path: str | Path,
        mmproj: str | Path | None = None,
        *,
        n_gpu_layers: int = -1,
        n_threads: int | None = None,
        use_mmap: bool = True,
        no_alloc: bool = False,
        rpc: Sequence[str] = (),
        embedding_cache: EmbeddingCache | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        """Open a GGUF text model and its mmproj.

        mmproj: default the one `*mmproj*.gguf` beside the model; without any the model reads text only.
        n_gpu_layers: layers on GPUs and RPC servers, -1 for all. n_threads: default the cores that this process may
        use. rpc: "host:port" of llama.cpp's RPC servers, which take layers and their cells as local GPUs do;
        pictures are encoded here. embedding_cache: keeps embeddings of pictures on disk. The default keeps none: what a
        program is shown is not written to the user's disk unless it asks for that (`edge-csp` asks).
        no_alloc: read the metadata only. Contexts then tell what they would take, and nothing can be evaluated.

        Raises ModelError if a file is missing, damaged or of the wrong kind, if the two do not fit each other, or if a
        server cannot be used. A server that goes away later ends the process: see rpc.py.
        """
        self.info: GgufInfo = read_info(path)
        mmproj = mmproj or (find_mmproj(path) if self.info.kind == "text" else None)
        self.mmproj_info: GgufInfo | None = read_info(mmproj) if mmproj else None
        if self.mmproj_info is not None:
            check_pair(self.info, self.mmproj_info)
        elif self.info.kind != "text":
            raise ModelError(f"{self.info.path} is {self.info.kind_words}, not a text model")

        self.no_alloc = no_alloc
        self.n_threads = n_threads or usable_cores()
        self.n_encoded = 0
        """Picture parts that the encoder has computed."""
        self.n_from_disk = 0
        """Picture parts whose embeddings were on disk."""
        self.offloaded = n_gpu_layers != 0 and (bool(rpc) or native.has_gpu())
        """True if layers and their cells lie in other memory than the host's."""
        self._embeddings: OrderedDict[tuple[str, int], NDArray[np.float32]] = OrderedDict()
        self._embedding_cache = embedding_cache
        self._encoder_id = ""
        self._servers: Servers | None = None
        self._llama: Any = None
        self._mtmd: Any = None
        native.silence_logs()
        try:
            if rpc:
                self._servers = Servers(rpc)
            self._load(n_gpu_layers, use_mmap, on_progress)
        except BaseException:
            self.close()
            raise

    def _load(self, n_gpu_layers: int, use_mmap: bool, on_progress: Progress | None) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        llama_cpp.llama_backend_init()
        native.clear_log_errors()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.no_alloc = self.no_alloc
        if not use_mmap or self.no_alloc:
            params.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE
        if self._servers:
            params.devices = ctypes.cast(self._servers.devices, ctypes.c_void_p)

        stopped: list[BaseException] = []  # exceptions (Ctrl-C, say) cannot pass through C

        def progress(done: float, _user_data: Any) -> bool:
            try:
                if on_progress:
                    on_progress("load", done)
            except BaseException as error:
                stopped.append(error)
            return not stopped

        params.progress_callback = callback = llama_cpp.llama_progress_callback(progress)
        self._llama = llama_cpp.llama_model_load_from_file(os.fsencode(self.info.path), params)
        del callback  # it had to live until here
        if stopped:
            raise stopped[0]
        if not self._llama:
            raise ModelError(f"{self.info.path} cannot be loaded: {native.last_log_error()}")
        native.use_huge_pages(self._llama)
        self._vocab = llama_cpp.llama_model_get_vocab(self._llama)

        if self.mmproj_info is not None:
            mtmd_params = mtmd_cpp.mtmd_context_params_default()
            mtmd_params.use_gpu = n_gpu_layers != 0
            mtmd_params.n_threads = self.n_threads
            mtmd_params.print_timings = False
            mtmd_params.warmup = False
            if self.no_alloc:
                mtmd_params.cb_eval = self._stop_encoder = type(mtmd_params.cb_eval)(lambda _tensor, ask, _data: ask)
            self._mtmd = mtmd_cpp.mtmd_init_from_file(os.fsencode(self.mmproj_info.path), self._llama, mtmd_params)
            if not self._mtmd:
                raise ModelError(f"{self.mmproj_info.path} cannot be loaded: {native.last_log_error()}")
            if self._embedding_cache is not None:
                self._encoder_id = self._identify_encoder(self._embedding_cache, mtmd_params)

    def _identify_encoder(self, cache: EmbeddingCache, params: Any) -> str:
        """All that embeddings depend on besides the picture: weights, settings, code, and where it runs."""
        import llama_cpp

        assert self.mmproj_info is not None
        try:
            digest = cache.file_digest(self.mmproj_info.path)
        except OSError as error:
            raise ModelError(f"{self.mmproj_info.path} cannot be read ({error.strerror or error})") from error
        device = "gpu" if params.use_gpu and native.has_gpu() else "cpu"
        settings = params.image_min_tokens, params.image_max_tokens, params.flash_attn_type
        return f"{_KEY_VERSION} {digest} {settings} {device} llama-cpp-python {llama_cpp.__version__}"

    @property
    def handle(self) -> Any:
        """The llama_model pointer."""
        return self._llama

    @property
    def offload_memory(self) -> int | None:
        """Bytes of the devices that hold layers and cells, None if that is not known."""
        if self._servers and self.offloaded:
            return self._servers.memory
        return None if self.offloaded else 0

    @property
    def mtmd_handle(self) -> Any:
        """The mtmd_context pointer, None for a text model."""
        return self._mtmd

    def tokenize(self, text: str, pictures: Sequence[Picture] = (), *, add_special: bool = False) -> list[Part]:
        """Parts of a rendered prompt; its n-th `<__media__>` marker stands for the n-th picture.

        add_special: add the BOS token, if the model uses one.
        Raises ModelError if there are pictures but no mmproj, if markers and pictures do not match, or if the model has
        no tokenizer.
        """
        import llama_cpp

        if llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp would abort
            raise ModelError(f"{self.info.path} has no tokenizer")
        if self._mtmd is None and pictures:
            raise ModelError(f"{self.info.path} has no mmproj: it cannot read pictures")
        if self._mtmd is None or not (pictures or MEDIA_MARKER in text):  # libmtmd would do the same, and more slowly
            tokens = self._tokenize_text(text, add_special)
            return [TokenPart(tokens)] if tokens else []
        return self._tokenize_mixed(text, pictures, add_special)

    def _tokenize_text(self, text: str, add_special: bool) -> tuple[int, ...]:
        import llama_cpp

        data = text.encode()
        buffer = (llama_cpp.llama_token * (len(data) + 2))()
        n = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), add_special, True)
        if n < 0:
            raise ModelError(f"{self.info.path}: a text of {len(data)} bytes cannot be tokenised")
        return tuple(buffer[:n])

    def _tokenize_mixed(self, text: str, pictures: Sequence[Picture], add_special: bool) -> list[Part]:
        from llama_cpp import mtmd_cpp

        native.clear_log_errors()
        data = text.encode()
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        bitmaps = []
        try:
            for number, picture in enumerate(pictures):
                width, height = picture.size
                pixels = picture.rgb.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
                bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, pixels)
                if not bitmap:
                    raise ModelError(f"{picture.name}: no memory for {width}x{height} pixels")
                bitmaps.append(bitmap)
                mtmd_cpp.mtmd_bitmap_set_id(bitmap, str(number).encode())
            inp = mtmd_cpp.mtmd_input_text(data, len(data), add_special, True)
            array = (mtmd_cpp.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
            status = mtmd_cpp.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(inp), array, len(bitmaps))
            if status == 1:
                raise ModelError(f"the prompt has not one marker for each of its {len(pictures)} pictures")
            if status != 0:
                raise ModelError(f"{self._mmproj_path}: cannot read the pictures: {native.last_log_error()}")
            return self._read_chunks(chunks, pictures)
        finally:
            for bitmap in bitmaps:
                mtmd_cpp.mtmd_bitmap_free(bitmap)
            mtmd_cpp.mtmd_input_chunks_free(chunks)

    def _read_chunks(self, chunks: Any, pictures: Sequence[Picture]) -> list[Part]:
        from llama_cpp import mtmd_cpp

        parts: list[Part] = []
        n_part: dict[int, int] = {}  # parts so far of each picture
        for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
            chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
            if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_TEXT:
                n = ctypes.c_size_t()
                tokens = mtmd_cpp.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(n))
                parts.append(TokenPart(tuple(tokens[: n.value]) if tokens else ()))
                continue
            number = int(mtmd_cpp.mtmd_input_chunk_get_id(chunk) or b"0")
            n_part[number] = n_part.get(number, -1) + 1
            copy = mtmd_cpp.mtmd_input_chunk_copy(chunk)
            part = PicturePart(
                sha256=pictures[number].sha256,
                index=n_part[number],
                n_cell=mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk),
                n_pos=mtmd_cpp.mtmd_input_chunk_get_n_pos(chunk),
                name=pictures[number].name,
                chunk=copy,
                size=_encoder_size(copy),
            )
            weakref.finalize(part, mtmd_cpp.mtmd_input_chunk_free, copy)
            parts.append(part)
        return parts

    def encode(self, part: PicturePart) -> NDArray[np.float32]:
        """Embeddings of a picture, f32 [n_cell, n_embd_inp]; computed once, then taken from memory or from disk.

        Raises ModelError if the encoder fails.
        """
        key = (part.sha256, part.index)
        if (known := self._embeddings.get(key)) is not None:
            self._embeddings.move_to_end(key)
            return known
        embeddings = self._encode_or_read(part)
        self._embeddings[key] = embeddings
        while sum(array.nbytes for array in self._embeddings.values()) > EMBEDDING_CACHE_BYTES:
            self._embeddings.popitem(last=False)
        return embeddings

    def encoder_scratch(self, part: PicturePart) -> int:
        """Bytes of scratch that the encoder takes for a picture, on all devices; the model is opened with no_alloc.

        libmtmd reserves them when the first picture comes, and tells only its log. Its graph stops at the first node.
        """
        from llama_cpp import mtmd_cpp

        with native.encoder_log() as lines:
            mtmd_cpp.mtmd_encode_chunk(self._mtmd, part.chunk)
        sizes = re.findall(r"compute buffer size = +([\d.]+) MiB", "".join(lines))
        if not sizes:
            raise ModelError(f"{self._mmproj_path}: the encoder cannot be set up for {part.name}: {''.join(lines)}")
        return sum(round(float(size) * 2**20) for size in sizes)

    def _encode_or_read(self, part: PicturePart) -> NDArray[np.float32]:
        cache, shape = self._embedding_cache, (part.n_cell, self.info.n_embd_inp)
        if cache is None:
            return self._encode(part, shape)
        key = f"{self._encoder_id} {part.sha256} {part.index}"
        data = cache.get(key)
        if data is not None and len(data) == 4 * shape[0] * shape[1]:
            self.n_from_disk += 1
            return np.frombuffer(data, "<f4").reshape(shape)
        embeddings = self._encode(part, shape)
        if np.isfinite(embeddings).all():  # a failure of the moment shall not last
            cache.put(key, embeddings.astype("<f4", copy=False).tobytes())
        return embeddings

    def _encode(self, part: PicturePart, shape: tuple[int, int]) -> NDArray[np.float32]:
        from llama_cpp import mtmd_cpp

        native.clear_log_errors()
        if mtmd_cpp.mtmd_encode_chunk(self._mtmd, part.chunk) != 0:
            raise ModelError(f"{part.name}: the encoder of {self._mmproj_path} failed: {native.last_log_error()}")
        self.n_encoded += 1
        return np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(self._mtmd), shape=shape).copy()

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """UTF-8 bytes of a token; they may be a part of a character. Control tokens are empty unless `special`."""
        import llama_cpp

        buffer = ctypes.create_string_buffer(256)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:n]

    def is_end(self, token: int) -> bool:
        """True for tokens that end an answer."""
        import llama_cpp

        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @property
    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        import llama_cpp

        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    @property
    def vocab(self) -> Any:
        """The llama_vocab pointer."""
        return self._vocab

    @property
    def _mmproj_path(self) -> Path | None:
        return self.mmproj_info.path if self.mmproj_info else None

    def close(self) -> None:
        """Free the model; contexts on it must be closed before. A second call does nothing."""
        if self._mtmd:
            from llama_cpp import mtmd_cpp

            mtmd_cpp.mtmd_free(self._mtmd)
        if self._llama:
            import llama_cpp

            llama_cpp.llama_model_free(self._llama)
        if self._servers:
            self._servers.close()
        self._llama = self._mtmd = self._servers = None
        self._embeddings.clear()

    def __enter__(self) -> VisionModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _encoder_size(chunk: Any) -> tuple[int, int]:
    """(width, height) in pixels of the picture in a chunk, (0, 0) if it holds several, or in an unknown format.

    The only call that tells is the one that saves a chunk without its pixels; mtmd.cpp (serialize) has the format.
    """
    from llama_cpp import mtmd_cpp

    n = ctypes.c_size_t()
    mtmd_cpp.mtmd_input_chunk_save(chunk, None, 0, ctypes.byref(n))
    data = (ctypes.c_char * n.value)()
    if mtmd_cpp.mtmd_input_chunk_save(chunk, data, n.value, ctypes.byref(n)) != 0:
        return 0, 0
    try:
        version, _type, n_text, has_image, *_grid, n_id = struct.unpack_from("=QIQB5IQ", data)
        if (version, n_text, has_image) != (2, 0, 1):
            return 0, 0
        *_flags, n_entry, width, height = struct.unpack_from("=BQ6x2i", data, struct.calcsize("=QIQB5IQ") + n_id)
    except struct.error:
        return 0, 0
    return (width, height) if n_entry == 1 else (0, 0)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
