"""GGUF headers: what is read, what is refused, which pairs fit."""

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_csp import metadata
from edge_csp.errors import ModelError
from edge_csp.metadata import check_pair, describe, find_mmproj, read_info

gguf = pytest.importorskip("gguf")

TEXT = {
    "general.name": "tiny",
    "general.file_type": 1,
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "a", "ü"],
    "tokenizer.ggml.scores": [0.0, 0.0, 1.0, 2.0],
    "tokenizer.ggml.merges": ["a b", "c d"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{{ messages[0].content }}",
}
MMPROJ = {
    "general.type": "mmproj",
    "clip.has_vision_encoder": True,
    "clip.projector_type": "mlp",
    "clip.vision.image_size": 32,
    "clip.vision.patch_size": 8,
    "clip.vision.embedding_length": 48,
    "clip.vision.block_count": 3,
    "clip.vision.attention.head_count": 4,
    "clip.vision.projection_dim": 768,  # as in LLaVA-1.5: CLIP's, not the projector's
}
WEIGHTS = {"token_embd.weight": (4, 64), "output.weight": (4, 64)}
PROJECTOR = {"mm.0.weight": (64, 48), "mm.2.weight": (64, 64)}  # numpy order: [out, in]
Shapes = dict[str, tuple[int, ...]]


def write(path: Path, arch: str, values: dict[str, Any], shapes: Shapes, dtype: type[np.generic] = np.float16) -> Path:
    """Write a GGUF file with zeros as weights; split.* keys are u16 as in llama.cpp."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint16 if key.startswith("split.") else writer.add_uint32)(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text_file(folder: Path, name: str = "model.gguf", shapes: Shapes = WEIGHTS, **values: Any) -> Path:
    return write(folder / name, "llama", TEXT | values, shapes)


def mmproj_file(folder: Path, name: str = "mmproj.gguf", shapes: Shapes = PROJECTOR, **values: Any) -> Path:
    return write(folder / name, "clip", MMPROJ | {f"clip.{key}": value for key, value in values.items()}, shapes)


def test_text_model(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    info = read_info(str(path))
    assert (info.path, info.kind, info.arch, info.name) == (path, "text", "llama", "tiny")
    assert (info.n_layer, info.n_embd, info.n_embd_inp, info.n_head, info.n_head_kv) == (2, 64, 64, 4, (2, 2))
    assert (info.head_dim_k, info.head_dim_v) == (16, 16)
    assert (info.n_ctx_train, info.n_vocab, info.quantisation, info.n_params) == (512, 4, "F16", 512)
    assert (info.bos_token, info.eos_token, info.chat_template) == ("<s>", "</s>", "{{ messages[0].content }}")
    assert (info.size_bytes, info.n_part) == (path.stat().st_size, 1)
    assert info.kv_values_per_cell == (64, 64)
    assert (info.projection_dim, info.has_vision, info.has_audio) == (None, False, False)


def test_mmproj(tmp_path: Path) -> None:
    info = read_info(mmproj_file(tmp_path))
    assert (info.kind, info.has_vision, info.has_audio) == ("mmproj", True, False)
    assert (info.projector_type, info.projection_dim) == ("mlp", 64)
    assert (info.image_size, info.patch_size, info.n_layer, info.n_embd) == (32, 8, 3, 48)


def test_per_layer_heads_and_head_sizes(tmp_path: Path) -> None:
    heads = {"llama.attention.head_count_kv": [2, 0], "llama.attention.head_count": [4, 8]}
    sizes = {"llama.attention.key_length": 24, "llama.attention.value_length": 8}
    info = read_info(text_file(tmp_path, **heads, **sizes))
    assert (info.n_head, info.n_head_kv, info.kv_values_per_cell) == (8, (2, 0), (48, 16))


def test_layers_that_hold_every_cell(tmp_path: Path) -> None:
    """Windows and states, where the file says which layers have them, and where upstream knows."""

    def heads(arch: str, **values: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_layer = {"llama.block_count": 8}
        renamed = {key.replace("llama.", f"{arch}."): value for key, value in (TEXT | n_layer | values).items()}
        info = read_info(write(tmp_path / "m.gguf", arch, renamed, WEIGHTS))
        return info.n_head_kv, info.n_head_kv_full

    window, pattern = "llama.attention.sliding_window", "llama.attention.sliding_window_pattern"
    every = (2,) * 8
    assert heads("llama") == (every, every)
    assert heads("gemma3", **{window: 16}) == (every, (0, 0, 0, 0, 0, 2, 0, 0))
    assert heads("gemma3") == (every, every)
    assert heads("smallthinker", **{window: 16}) == (every, (2, 0, 0, 0, 2, 0, 0, 0))
    assert heads("phi3", **{window: 16}) == (every, every)
    assert heads("gemma2", **{window: 16, pattern: 4}) == (every, (0, 0, 0, 2, 0, 0, 0, 2))
    assert heads("gemma4", **{window: 16, pattern: [True, False] * 4}) == (every, (0, 2) * 4)
    states = "llama.attention.recurrent_layers", "llama.full_attention_interval"
    assert heads("qwen3next") == ((0, 0, 0, 2, 0, 0, 0, 2),) * 2
    assert heads("qwen3next", **{states[1]: 2}) == ((0, 2) * 4,) * 2
    assert heads("jamba", **{states[0]: [True] * 7 + [False]}) == ((0,) * 7 + (2,),) * 2


def test_tensor_spans(tmp_path: Path) -> None:
    path = text_file(tmp_path)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    spans = metadata.tensor_spans(path)
    assert spans == {
        name: (0, tensor.data_offset, tensor.data_offset + tensor.n_bytes) for name, tensor in read.items()
    }
    assert read_info(path).tensor_bytes == sum(tensor.n_bytes for tensor in read.values())


def test_heads_default_to_query_heads(tmp_path: Path) -> None:
    values = {key: value for key, value in TEXT.items() if not key.endswith("head_count_kv")}
    assert read_info(write(tmp_path / "m.gguf", "llama", values, WEIGHTS)).n_head_kv == (4, 4)


def test_quantisation_words(tmp_path: Path) -> None:
    assert read_info(text_file(tmp_path, **{"general.file_type": 15})).quantisation == "Q4_K_M"
    values = {key: value for key, value in TEXT.items() if key != "general.file_type"}
    assert read_info(write(tmp_path / "m.gguf", "llama", values, WEIGHTS, np.float32)).quantisation == "F32"


def test_tables_agree_with_gguf() -> None:
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert metadata._TENSOR_TYPES[int(kind)] == (kind.name, *sizes)
    for file_type in gguf.LlamaFileType:
        name = file_type.name.removeprefix("ALL_").removeprefix("MOSTLY_")
        assert name == "GUESSED" or metadata._FILE_TYPES[int(file_type)] == name


def test_agrees_with_the_gguf_reader(shared: Path) -> None:
    for path in sorted((shared / "models").glob("*.gguf")):
        header, reader = metadata._read_header(path), gguf.GGUFReader(path)
        for key, value in header.values.items():
            assert value is None or value == reader.get_field(key).contents(), key
        assert header.values.keys() == {key for key in reader.fields if not key.startswith("GGUF.")}
        assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
        assert [t.dims for t in header.tensors.values()] == [tuple(t.shape.tolist()) for t in reader.tensors]


def test_real_pair(shared: Path) -> None:
    text = read_info(shared / "models" / "bootstrap-text-f16.gguf")
    check_pair(text, read_info(shared / "models" / "bootstrap-mmproj-f16.gguf"))
    assert dict(describe(text))["KV cache, f16"] == "1024 bytes per cell, 4.0 MiB for 4096 cells"


def test_large_vocabulary_is_quick(tmp_path: Path) -> None:
    tokens = [f"token {index}" for index in range(50_000)]
    path = text_file(tmp_path, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": tokens})
    start = time.perf_counter()
    assert read_info(path).n_vocab == 50_000
    assert time.perf_counter() - start < 5  # 0.2 s; gguf.GGUFReader takes 2 s


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("empty",)),
        (b"GG", ("not a GGUF file", "b'GG'")),
        (b"This is a text.\n" * 99, ("not a GGUF file", "b'This'")),
        (b"GGUF", ("cut off or damaged", "byte 4 of 4")),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), ("version 1", "version 2 and 3")),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), ("version 4",)),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ("big-endian",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), ("cut off or damaged",)),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), ("cut off or damaged",)),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60) + b"key", ("cut off or damaged", 2**60)),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 0, 2**62), ("cut off or damaged", 2**62)),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**62), ("cut off or damaged",)),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), ("damaged", "value type 9")),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), ("damaged", "value type 77")),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 99), ("damaged", "99 dimensions")),
    ],
)
def test_damaged_headers(content: bytes, words: tuple[object, ...], tmp_path: Path, refuses) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with refuses(ModelError, path, *words):
        read_info(path)


def test_paths_that_are_no_files(tmp_path: Path, refuses) -> None:
    with refuses(ModelError, tmp_path / "gone.gguf", "no such file"):
        read_info(tmp_path / "gone.gguf")
    with refuses(ModelError, tmp_path, "directory"):
        read_info(tmp_path)
    with refuses(ModelError, "cannot be read"):
        read_info("nul\0.gguf")


def test_truncated_tail(tmp_path: Path, refuses) -> None:
    path = text_file(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[:-64])
    with refuses(ModelError, path, "cut off", len(content) - 64, len(content)):
        read_info(path)


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = text_file(tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError) as caught:
            read_info(path)
        assert str(caught.value).isprintable()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_damaged_bytes_never_escape(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        text_file(tmp_path, path.name)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    (tmp_path / "damaged.gguf").write_bytes(content)
    with suppress(ModelError):
        assert describe(read_info(tmp_path / "damaged.gguf"))


def test_number_of_layers_is_limited(tmp_path: Path, refuses) -> None:
    for n_layer in (0, 513, 2**32 - 1):
        with refuses(ModelError, "model.gguf", n_layer, 512):
            read_info(text_file(tmp_path, **{"llama.block_count": n_layer}))


def test_other_kinds(tmp_path: Path, refuses) -> None:
    mmproj = read_info(mmproj_file(tmp_path))
    others = {
        "LoRA adapter": text_file(tmp_path, "lora.gguf", **{"general.type": "adapter"}),
        "importance matrix": write(tmp_path / "i.gguf", "", {"general.type": "imatrix"}, WEIGHTS),
        "vocabulary only": text_file(tmp_path, "vocab.gguf", shapes={}),
        "without a language model": write(tmp_path / "sd.gguf", "flux", {}, WEIGHTS),
        "encoder for embeddings": text_file(tmp_path, "bert.gguf", **{"llama.attention.causal": False}),
    }
    for words, path in others.items():
        info = read_info(path)
        assert info.kind == "other"
        assert describe(info)
        with refuses(ModelError, path, words):
            check_pair(info, mmproj)
        with refuses(ModelError, path, words, "not an mmproj"):
            check_pair(read_info(text_file(tmp_path)), info)


def test_pairs(tmp_path: Path, refuses) -> None:
    text, mmproj = read_info(text_file(tmp_path)), read_info(mmproj_file(tmp_path))
    check_pair(text, mmproj)
    with refuses(ModelError, text.path, mmproj.path, "exchange them"):
        check_pair(mmproj, text)
    with refuses(ModelError, mmproj.path, "is an mmproj, not a text model"):
        check_pair(mmproj, mmproj)
    with refuses(ModelError, text.path, "is a text model, not an mmproj"):
        check_pair(text, text)
    wide = read_info(mmproj_file(tmp_path, "wide.gguf", {"mm.2.weight": (96, 64)}))
    with refuses(ModelError, text.path, wide.path, 64, 96, "another model"):
        check_pair(text, wide)
    audio = read_info(mmproj_file(tmp_path, "audio.gguf", has_vision_encoder=False, has_audio_encoder=True))
    with refuses(ModelError, audio.path, "without a vision encoder"):
        check_pair(text, audio)


@pytest.mark.parametrize(
    ("projector", "shapes", "expected"),
    [
        ("mlp", {"mm.2.weight": (64, 8), "mm.3.bias": (32,)}, 32),
        ("qwen2.5vl_merger", {"mm.0.weight": (8, 8), "mm.2.weight": (64, 8)}, 64),
        ("gemma3", {"mm.input_projection.weight": (48, 64)}, 64),
        ("idefics3", {"mm.model.fc.weight": (64, 48)}, 64),
        ("qwen3vl_merger", {"mm.2.weight": (64, 8)}, 64),
        (
            "qwen3vl_merger",
            {"mm.2.weight": (64, 8), "v.deepstack.1.fc1.weight": (4, 4), "v.deepstack.3.fc1.weight": (4, 4)},
            192,
        ),
        ("projector of tomorrow", {"mm.2.weight": (1, 2)}, None),
        ("idefics3", {"mm.2.weight": (1, 2)}, None),
    ],
)
def test_projectors(projector: str, shapes: Shapes, expected: int | None, tmp_path: Path) -> None:
    info = read_info(mmproj_file(tmp_path, shapes=shapes, projector_type=projector))
    assert info.projection_dim == expected
    if expected is None:
        check_pair(read_info(text_file(tmp_path)), info)  # libmtmd decides


@pytest.mark.parametrize("deepstack", [{"llama.n_deepstack_layers": 2}, {"llama.deepstack_mapping": [-1, 4, 4, 7]}])
def test_deepstack_inputs(deepstack: dict[str, Any], tmp_path: Path) -> None:
    assert read_info(text_file(tmp_path, **deepstack)).n_embd_inp == 192


def split_model(folder: Path, n_part: int = 3) -> list[Path]:
    paths = []
    for number in range(n_part):
        values = (TEXT if number == 0 else {}) | {"split.count": n_part, "split.no": number}
        name = f"big-{number + 1:05}-of-{n_part:05}.gguf"
        paths.append(write(folder / name, "llama", values, {f"blk.{number}.weight": (8, 8)}))
    return paths


def test_split_models(tmp_path: Path, refuses) -> None:
    paths = split_model(tmp_path)
    info = read_info(paths[0])
    assert (info.kind, info.n_part, info.n_params) == ("text", 3, 192)
    assert info.size_bytes == sum(path.stat().st_size for path in paths)
    assert dict(describe(info))["parts"] == "3"
    with refuses(ModelError, paths[1], "part 2 of 3", paths[0].name):
        read_info(paths[1])
    paths[1].write_bytes(paths[1].read_bytes()[:-32])
    with refuses(ModelError, paths[1], "cut off"):
        read_info(paths[0])
    paths[1].unlink()
    with refuses(ModelError, paths[0], 3, paths[1].name, "missing"):
        read_info(paths[0])
    renamed = paths[0].rename(tmp_path / "renamed.gguf")
    with refuses(ModelError, renamed, "part 1 of 3"):
        read_info(renamed)


def test_find_mmproj(tmp_path: Path, refuses) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    (tmp_path / "mmproj.txt").touch()
    assert find_mmproj(model) is None
    first = tmp_path / "MMPROJ-model-f16.GGUF"
    first.touch()
    assert find_mmproj(str(model)) == first
    (tmp_path / "model.mmproj-q8_0.gguf").touch()
    with refuses(ModelError, 2, model, first.name, "model.mmproj-q8_0.gguf", "--mmproj"):
        find_mmproj(model)
    with refuses(ModelError, tmp_path / "gone"):
        find_mmproj(tmp_path / "gone" / "model.gguf")


def test_mmproj_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "mmproj.gguf").touch()
    assert find_mmproj(tmp_path / "mmproj.gguf") is None


def test_descriptions(tmp_path: Path) -> None:
    text = dict(describe(read_info(text_file(tmp_path, **{"general.name": "ti\x1b[2Jny\n"}))))
    assert text["KV cache, f16"] == "256 bytes per cell, 1.0 MiB for 4096 cells"
    assert (text["name"], text["kind"], text["heads"], text["KV heads"]) == (
        "ti?[2Jny?",
        "text (a text model)",
        "4",
        "2",
    )
    assert "parts" not in text
    mmproj = dict(describe(read_info(mmproj_file(tmp_path))))
    assert mmproj["makes"] == "embeddings of 64 values"
    assert mmproj["picture size"] == "32 pixels, patches of 8"
    assert "KV heads" not in mmproj


@pytest.mark.parametrize(
    ("n_bytes", "words"), [(1023, "1023 bytes"), (1024, "1.0 KiB"), (2**21, "2.0 MiB"), (2**50, "1024.0 TiB")]
)
def test_sizes(n_bytes: int, words: str) -> None:
    size: Callable[[int], str] = metadata._size
    assert size(n_bytes) == words
