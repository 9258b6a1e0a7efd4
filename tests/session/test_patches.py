"""Which patches are kept: counted in the cache itself, laid out as the encoder sees the picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_csp import Context, Picture, Pruning, Session, VisionModel, load_picture, make_policy, parse_budget
from edge_csp.errors import ModelError
from edge_csp.items import Item
from edge_csp.patches import boxes, grid
from tests.oracle.random_mmproj import make_mmproj
from tests.oracle.random_models import make_model

ROOT = Path(__file__).parents[2]
QUESTION = {"type": "text", "text": "What is in picture 1?"}
MROPE_TOKENS = [*"abcdefghijklmnopqrstuvwxyz .?:\n", "<|vision_start|>", "<|vision_end|>"]


def picture(seed: int, width: int = 64, height: int = 64) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return load_picture(Image.fromarray(pixels), name=f"{seed}.png")


@pytest.fixture(scope="module")
def model(demo_files: tuple[Path, Path]) -> Iterator[VisionModel]:
    with VisionModel(*demo_files, n_threads=1) as opened:
        yield opened


def pruned(model: VisionModel, budget: str = "30%", policy: str = "csp", n_ctx: int = 2048, **settings: int) -> Session:
    pruning = Pruning(parse_budget(budget), make_policy(policy), min_cells=0, **settings)
    return Session(Context(model, n_ctx=n_ctx), pruning=pruning)


def test_shares_are_those_of_the_cells(model: VisionModel) -> None:
    """Against positions and tags in the cache, over three evictions, an answer, and new cells behind the kept ones."""
    chat = pruned(model)
    for turn, n_picture in enumerate((2, 1, 0)):
        list(chat.ask("What is in picture 1?", [picture(10 * turn + i) for i in range(n_picture)], n_predict=4))
    chat.prefill([*chat.messages, {"role": "user", "content": "Who?"}])
    pos, tag = chat.context.cells()
    maps = chat.kept_patches()
    assert [(one.name, one.number, one.part) for one in maps] == [("0.png", 1, 0), ("1.png", 2, 0), ("10.png", 3, 0)]
    tokens = [item.key for item in chat._items]
    for one in maps:
        begin = sum(item.n_pos for item in chat._items[: tokens.index((one.sha256, 0))])
        for il, row, column in np.ndindex(one.share.shape):
            is_it = pos[il] == begin + 8 * row + column
            assert one.share[il, row, column] == is_it.sum() / pos.shape[1]
            assert (tag[il][is_it] == 1).all()
    assert all(one.share.shape == (pos.shape[0], 8, 8) for one in maps)
    assert 0 < np.mean([one.share for one in maps]) < 0.5
    chat.context.close()


def test_turns_and_pictures_add_up(model: VisionModel) -> None:
    chat = Session(Context(model, n_ctx=2048), pruning=Pruning(parse_budget("30%")), system="Be short.")
    for turn in range(3):
        list(chat.ask("What is in picture 1?", [picture(turn)], n_predict=4))
        use, turns = chat.cache_use(), chat.kept_turns()
        assert [one.number for one in turns] == list(range(turn + 2))
        assert sum(one.n_cell for one in turns) == use.n_text
        assert sum(one.kept for one in turns) == pytest.approx(use.text_kept)
        kept = [one.share.mean() * one.share[0].size for one in chat.kept_patches()]
        assert kept == pytest.approx([one.kept for one in use.pictures])
    n_last = turns[-1].n_cell
    assert chat.undo()
    assert [one.n_cell for one in chat.kept_turns()] == [one.n_cell for one in turns[:-1]]
    assert n_last > 10
    chat.context.close()


def test_turns_are_where_their_tokens_are(model: VisionModel) -> None:
    """Without eviction, a turn has the tokens of its own text."""
    chat = pruned(model, "100%")
    assert chat.kept_turns() == chat.kept_patches() == []
    lengths = []
    for text in ("Who?", "What is in picture 1? " * 5):
        before = chat.n_token
        list(chat.ask(text, n_predict=3))
        lengths.append(chat.n_token - before)
    turns = chat.kept_turns()
    assert [one.n_cell for one in turns] == [one.kept for one in turns] == lengths
    chat.context.close()


def test_nothing_is_evicted_without_pruning(model: VisionModel) -> None:
    with Context(model, prune=False) as context:
        chat = Session(context)
        list(chat.ask("Who?", [picture(1)], n_predict=2))
        (one,) = chat.kept_patches()
        assert one.share.shape == (model.info.n_layer, 8, 8)
        assert (one.share == 1).all()
        assert sum(turn.kept for turn in chat.kept_turns()) == chat.cache_use().n_text


def test_numbers_follow_the_kept_cells(model: VisionModel) -> None:
    """Evict, add, evict, cut and clear, at random; without M-RoPE the position of a cell is its number."""
    random = np.random.default_rng(0)
    with Context(model, n_ctx=512) as context:
        for _ in range(30):
            if random.random() < 0.1:
                context.clear()
            context.decode_tokens(random.integers(0, 100, random.integers(1, 40)).tolist())
            if random.random() < 0.3:
                context.truncate(context.n_past - 1)
                context.decode_tokens([1])
            pos, _ = context.cells()
            np.testing.assert_array_equal(context.cell_numbers(), pos)
            n_cell = context.n_cell
            n_keep = int(random.integers(max(1, n_cell // 3), n_cell + 1))
            rows = [
                [*sorted(random.choice(n_cell - 1, n_keep - 1, replace=False)), n_cell - 1]
                for _ in range(pos.shape[0] * pos.shape[1])
            ]
            context.keep(np.array(rows, np.int32).reshape(*pos.shape[:2], n_keep))
            np.testing.assert_array_equal(context.cell_numbers(), context.cells()[0])


@pytest.fixture(scope="module")
def mrope(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionModel]:
    folder = tmp_path_factory.mktemp("mrope")
    text = make_model(
        folder / "m-rope.gguf", "qwen2vl", n_head=4, head_dim=32, n_vocab=len(MROPE_TOKENS), tokens=MROPE_TOKENS
    )
    with VisionModel(text, make_mmproj(folder / "mmproj.gguf", "qwen2vl_merger"), n_threads=1) as opened:
        yield opened


def test_cells_that_share_a_position(mrope: VisionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """M-RoPE: against the cells that the policy chose, followed from one eviction to the next."""
    chat = pruned(mrope, "20%", "random", n_recent=1, n_sink=1)
    chosen: list[np.ndarray] = []
    keep = chat.context.keep
    monkeypatch.setattr(chat.context, "keep", lambda cells: (chosen.append(cells.copy()), keep(cells)))
    list(chat.ask("who?", [picture(1, 320, 256)], n_predict=2))
    (first,) = chat.kept_patches()
    begin = next(i for i, item in enumerate(chat._items) if item.is_picture)
    n_row, n_column = first.share.shape[1:]
    assert chat._items[begin].n_pos == max(n_row, n_column) < n_row * n_column
    numbers = chosen[0]
    for il, row, column in np.ndindex(first.share.shape):
        n_kept = (numbers[il] == begin + row * n_column + column).sum()
        assert first.share[il, row, column] == n_kept / numbers.shape[1]
    list(chat.ask("what?", [picture(2, 128, 320)], n_predict=2))
    again, second = chat.kept_patches()
    assert len(chosen) == 2
    assert (again.share <= first.share).all()
    n_new = chosen[1].max() + 1 - chosen[0].shape[-1]
    shape = *chosen[0].shape[:2], n_new
    last = chosen[0][..., -1:] + 1
    before = np.concatenate([chosen[0], np.broadcast_to(last + np.arange(n_new), shape)], axis=-1)
    numbers = np.take_along_axis(before, chosen[1], axis=-1)
    start = 0
    for item in chat._items:
        if item.key == (second.sha256, 0):
            break
        start += item.n_cell
    for il, row, column in np.ndindex(second.share.shape):
        n_kept = (numbers[il] == start + row * second.share.shape[2] + column).sum()
        assert second.share[il, row, column] == n_kept / numbers.shape[1]
    chat.context.close()


PROJECTORS = ["mlp", "gemma3", "idefics3", "internvl", "qwen2vl_merger", "pixtral"]


@pytest.fixture(scope="module", params=PROJECTORS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionModel]:
    """Encoders with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    text = ROOT / "edge_csp" / "demo" / "demo-text-f16.gguf"
    with VisionModel(text, make_mmproj(folder / "mmproj.gguf", request.param, n_layer=1), n_threads=1) as opened:
        yield opened


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 100), (90, 180), (256, 170), (61, 83), (250, 70)])
def test_patches_lie_where_the_encoder_sees_them(encoder: VisionModel, width: int, height: int) -> None:
    """A change of some pixels changes the cell over them more than any other, in every part that shows them."""
    assert encoder.mmproj_info is not None
    projector = encoder.mmproj_info.projector_type
    pixels = np.full((height, width, 3), 128, np.uint8)

    def parts(rgb: np.ndarray) -> list:
        shown = load_picture(Image.fromarray(rgb))
        return [part for part in encoder.tokenize("<__media__>", [shown]) if hasattr(part, "size")]

    plain = parts(pixels)
    before = [encoder.encode(part) for part in plain]
    items = [Item((part.sha256, part.index), part.n_cell, part.n_pos, part.name, part, part.size) for part in plain]
    places = boxes((width, height), [item.size for item in items], projector)
    n_right = n_all = 0
    random = np.random.default_rng(0)
    for _ in range(6):
        x, y = int(random.integers(0, width - 4)), int(random.integers(0, height - 4))
        changed = pixels.copy()
        changed[y : y + 4, x : x + 4] = random.choice([0, 255])
        for i, part in enumerate(parts(changed)):
            (left, top, right, bottom), (columns, rows, stride) = places[i], grid(items[i], projector)
            change = np.abs(encoder.encode(part) - before[i]).sum(axis=1)
            column, row = ((x + 2 - left) / (right - left) * columns), ((y + 2 - top) / (bottom - top) * rows)
            if not (0 <= column < columns and 0 <= row < rows):
                continue
            n_all += 1
            most = divmod(int(change.argmax()), stride)
            n_right += abs(most[0] + 0.5 - row) < 1.2 and abs(most[1] + 0.5 - column) < 1.2
    assert n_all >= 6
    assert n_right == n_all


def test_cells_that_are_no_grid() -> None:
    item = Item(("00", 0), 66, 66, "a.png", None, (64, 64))
    with pytest.raises(ModelError, match=r"a\.png: the 66 cells that the encoder \(mlp\) makes of 64x64 pixels"):
        grid(item, "mlp")
    with pytest.raises(ModelError, match="of an unknown type"):
        grid(Item(("00", 0), 64, 64, "a.png", None, (0, 0)), None)
    for projector in ("resampler", "deepseekocr2"):
        with pytest.raises(ModelError, match="not known to lie on a grid"):
            grid(Item(("00", 0), 64, 64, "a.png", None, (448, 448)), projector)
    with pytest.raises(ModelError, match="in 5 parts, and where they lie is not known"):
        boxes((100, 100), [(64, 64)] * 5, "llama4")


@pytest.mark.parametrize("longest", [2, 4, 5])
def test_tiles_are_laid_out_as_they_are_cut(longest: int) -> None:
    """The rule of Idefics3: the longer side has so many tiles, the shorter one as many as it needs."""
    for width, height in itertools.product(range(30, 400, 7), repeat=2):
        columns = longest if width >= height else -(-longest * width // height)
        rows = longest if height >= width else -(-longest * height // width)
        places = boxes((width, height), [(64, 64)] * (columns * rows + 1), "idefics3")
        expected = [(x, y) for y in range(rows) for x in range(columns)]
        assert [(round(p[0] * columns / width), round(p[1] * rows / height)) for p in places[:-1]] == expected
        assert places[-1] == (0, 0, width, height)
