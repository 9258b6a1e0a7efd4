"""`edge-csp map`: which patches of the pictures are left in the cache, as pictures and as bars."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_csp.cli import options
from edge_csp.cli.options import (
    ContextOptions,
    Images,
    ModelOptions,
    Prompt,
    PromptOptions,
    PruningOptions,
    SamplingOptions,
    clean,
    grouped,
    opened,
)
from edge_csp.errors import EdgeCspError

if TYPE_CHECKING:
    from edge_csp.chat import Message
    from edge_csp.images import Picture
    from edge_csp.overlay import Patches
    from edge_csp.patches import Box, PictureMap
    from edge_csp.session import Session

PRUNING = PruningOptions(budget="20%")
FOLDER = Path("edge-csp-map")
SHEET = "kept.png"


@grouped
def command(
    model: ModelOptions,
    context: ContextOptions,
    prompt: Prompt = None,
    image: Images = [],  # noqa: B006 (of typer, which copies it)
    pruning: PruningOptions = PRUNING,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the pictures.")] = FOLDER,
    layer: Annotated[
        str | None,
        typer.Option("--layer", metavar="N|all", help="Also write a picture for layer N of the cache, or for each."),
    ] = None,
) -> None:
    """Show what is kept of the pictures after a prompt: the more heads evicted a patch, the darker it is.

    Without -m and --image: the embedded model and album, and the first question about it. The budget is 20% unless it
    is given.
    """
    from edge_csp.cli.render import Bars, say

    if model.model or model.hf_repo or image:
        messages = _messages(prompt, image)
    else:
        model, messages = replace(model, model="demo"), _album(prompt)
    bars = Bars()
    settings = model, context, pruning, SamplingOptions(), PromptOptions()
    try:
        with opened(*settings, cells_of=messages, on_progress=bars) as session:
            if session.template.notice:
                say(session.template.notice)
            session.prefill(messages)
            session.prune()
            session.messages = messages
            bars.close()
            write_maps(session, out, layer)
    finally:
        bars.close()


def _album(question: str | None) -> list[Message]:
    from edge_csp.cli.demo import read_album

    album = read_album(options.DEMO / "album")
    return [*album.messages, {"role": "user", "content": clean(question) if question else album.questions[0][0]}]


def _messages(prompt: str | None, paths: list[Path]) -> list[Message]:
    from edge_csp.cli.render import notes
    from edge_csp.cli.run import prompt_text
    from edge_csp.images import load_picture

    if not paths:
        raise EdgeCspError("no picture: give one with --image (without -m it is the embedded album)")
    text = prompt_text(prompt)
    pictures = [load_picture(path) for path in paths]
    for picture in pictures:
        notes(picture)
    parts = [{"type": "image", "picture": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def write_maps(session: Session, folder: Path, layer: str | None = None) -> None:
    """Write an overlay of every picture in the conversation and a sheet of them all, and print the bars.

    layer: also write overlays of this layer, or of "all".

    Raises EdgeCspError if there are no pictures or no such layer, ModelError if the patches of a picture are not known,
    ImageError if files cannot be written or would replace others; nothing has been written then.
    """
    from edge_csp.cli.render import kept_bars, say, stdout
    from edge_csp.overlay import SHEET_SIDE, contact_sheet, draw_kept, prepare_files, write

    overlays = list(_overlays(session))
    if not overlays:
        raise EdgeCspError("there are no pictures in the conversation")
    layers = _layers(layer, len(overlays[0].maps[0].share))
    files = {(one.name, il): folder / _file_name(one.name, il) for one in overlays for il in (None, *layers)}
    prepare_files([*files.values(), folder / SHEET])
    drawn = []
    for one in overlays:
        for il in (None, *layers):
            image = draw_kept(one.picture.rgb, one.patches(il))
            write(image, files[one.name, il])
            if il is None:
                image.thumbnail((SHEET_SIDE, SHEET_SIDE))  # not all of them at their full size
                drawn.append(image)
    write(contact_sheet(drawn), folder / SHEET)
    stdout().print(kept_bars(session.cache_use(), session.kept_turns()))
    say(f"wrote {len(files) + 1} pictures to {folder}; {SHEET} shows all")


@dataclass(frozen=True)
class _Overlay:
    """A picture, and the parts of it that are drawn on one overlay."""

    name: str
    picture: Picture
    maps: Sequence[PictureMap]
    boxes: Sequence[Box]

    def patches(self, il: int | None) -> list[Patches]:
        """Shares of a layer, or of all layers on average."""
        shares = [one.share.mean(axis=0) if il is None else one.share[il] for one in self.maps]
        return list(zip(self.boxes, shares, strict=True))


def _overlays(session: Session) -> Iterator[_Overlay]:
    """One for every picture in the messages; of one that is read in tiles, one for the whole and one for the tiles."""
    from edge_csp.patches import boxes

    mmproj = session.model.mmproj_info
    projector = mmproj.projector_type if mmproj else None
    pictures = {picture.sha256: picture for picture in session.pictures()}
    for number, group in groupby(session.kept_patches(), key=lambda one: one.number):
        maps = list(group)
        picture = pictures.get(maps[0].sha256)
        if picture is None:  # it was taken back, and its cells are there until the next question
            continue
        places = boxes(picture.size, [one.size for one in maps], projector)
        yield _Overlay(f"{number:02}", picture, maps[-1:], places[-1:])
        if len(maps) > 1:
            yield _Overlay(f"{number:02}-tiles", picture, maps[:-1], places[:-1])


def _file_name(name: str, il: int | None) -> str:
    return f"kept-{name}.png" if il is None else f"kept-{name}-layer-{il:02}.png"


def _layers(given: str | None, n_layer: int) -> list[int]:
    if given is None:
        return []
    if given == "all":
        return list(range(n_layer))
    if not given.isascii() or not given.isdecimal() or int(given) >= n_layer:
        raise EdgeCspError(f"--layer {clean(given)!r}: the cache has the layers 0 to {n_layer - 1}, or write `all`")
    return [int(given)]
