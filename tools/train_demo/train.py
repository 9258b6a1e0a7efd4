"""The language stage: pictures as cached features, a curriculum over album sizes, auxiliary probes of the first blocks.

Every picture comes with all of its tokens, always: a model that was trained on parts of pictures hardly minds which
cells are evicted, and says nothing about the rule that chose them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_csp.demo.albums import NAMES, QUESTIONS, Target
from edge_csp.demo.scenes import COLORS, SHAPES

from .albums import MAX_PICTURES, Conversation, make_conversation, tokenizer
from .chat import ASSISTANT, END, PAD, segments
from .language import LanguageModel, causal_attention
from .optim import MuonAdamW, Progress, schedule
from .shape import Shape
from .vision import Features, Projector

NONE = -100  # the index that cross_entropy ignores
LEVELS = (2, 3, 4, 6, 8, 10, 12, 14, 16)  # pictures per conversation, up to the shape's
ADVANCE_AT = 0.9  # share of looked-up tokens that are right
LAST_ADVANCE = 0.6  # progress at which the largest albums begin in any case
N_QUESTIONS = 20
TOKENS_PER_BATCH = 4096  # few: more steps are worth more than quieter ones
END_WEIGHT = 0.1
PROBE_WEIGHT = 0.3  # of each probe's cross entropy
KINDS = {kind: i for i, kind in enumerate(QUESTIONS)}
NAME_ID = {name: i for i, name in enumerate(NAMES)}

# What the probes read: number of classes, and the block behind which they read it.
PROBES = {
    "number": (MAX_PICTURES, 0),  # tokens that show a detail of a picture: its number …
    "name": (len(NAMES), 1),  # … who was introduced before it (not merely mentioned, so it takes two blocks) …
    "color": (len(COLORS), 0),  # … and the detail
    "shape": (len(SHAPES), 0),
    "digit": (10, 0),
    "fact_name": (len(NAMES), 0),  # values of facts: whom they are about
    "fact_value": (100, 1),  # … and the values themselves
    "asked_number": (MAX_PICTURES, 0),  # answer tokens: what the question refers to
    "asked_name": (len(NAMES), 0),
    "asked_color": (len(COLORS), 0),
    "asked_shape": (len(SHAPES), 0),
    "asked_kind": (len(KINDS), 0),
}


@dataclass
class Sample:
    """One conversation as tokens. Lists are per position, except ``probes``: name -> {position: class}."""

    ids: list[int] = field(default_factory=list)
    feature: list[int] = field(default_factory=list)  # row of the flattened feature cache, or -1
    pos: list[tuple[int, int, int]] = field(default_factory=list)  # time, row, column
    target: list[int] = field(default_factory=list)  # token to predict next, or NONE
    content: list[bool] = field(default_factory=list)  # the answer token that has to be looked up
    looks: list[tuple[int, int]] = field(default_factory=list)  # (position, where it finds what it has to say)
    probes: dict[str, dict[int, int]] = field(default_factory=lambda: {name: {} for name in PROBES})


def _is_content(text: str) -> bool:
    return text.strip(" Ġ").lower() in _CONTENT


_CONTENT = {*COLORS, *SHAPES, *(str(i) for i in range(100))}


def encode(conversation: Conversation, shape: Shape, labels: np.ndarray, detail: np.ndarray) -> Sample:
    """Tokenise a conversation about pictures of a pool with these labels (n, 3) and detail tokens (n, 3)."""
    tok, out = tokenizer(), Sample()
    position, picture, answer = 0, -1, -1
    values: dict[str, list[int]] = {}  # name -> where the values of the fact about it stand
    shown: dict[tuple[int, int], int] = {}  # colour and shape -> where the shape is to be seen

    def push(token: int, pos: tuple[int, int, int], feature: int = -1, learn: bool = False) -> None:
        if learn:  # the position before learns to predict this token
            out.target[-1] = token
            out.content[-1] = _is_content(tok.tokens[token])
        out.ids.append(token)
        out.feature.append(feature)
        out.pos.append(pos)
        out.target.append(NONE)
        out.content.append(False)

    def push_text(token: int, learn: bool = False) -> None:
        nonlocal position
        push(token, (position,) * 3, learn=learn)
        position += 1

    for segment in segments(conversation.messages, conversation.numbers):
        if segment.kind == "control":
            push_text(tok.id[segment.text], learn=segment.text == END)
            answer += segment.text == ASSISTANT
        elif segment.kind == "image":
            picture += 1
            row = conversation.pictures[picture]
            for _, token in shape.picture_frame[:1]:
                push_text(tok.id[token])
            shown[int(labels[row][0]), int(labels[row][1])] = len(out.ids) + int(detail[row][1])
            _probe_picture(out, conversation, picture, labels[row], detail[row])
            for i, pos in enumerate(shape.picture_positions(position)):
                push(tok.id[PAD], pos, feature=row * shape.vision.n_tokens + i)
            position += shape.positions_per_picture
            for _, token in shape.picture_frame[1:]:
                push_text(tok.id[token])
        else:
            learn = segment.kind == "answer"
            about = conversation.facts.get(segment.text.strip())
            if learn:
                _probe_reference(out, conversation, answer)
            found = iter(_where_to_look(conversation.targets[answer], values, shown) if learn else [])
            for token in tok.encode(segment.text):
                if learn and tok.tokens[token].isdigit() and (where := next(found, None)) is not None:
                    out.looks.append((len(out.ids) - 1, where))
                push_text(token, learn=learn)
                if about is not None and tok.tokens[token].isdigit():
                    values.setdefault(about, []).append(len(out.ids) - 1)
                    out.probes["fact_value"][len(out.ids) - 1] = int(tok.tokens[token])
                    out.probes["fact_name"][len(out.ids) - 1] = NAME_ID.get(about, NONE)
                if learn:
                    _probe_reference(out, conversation, answer)
    return out


def _probe_picture(
    out: Sample, conversation: Conversation, picture: int, labels: np.ndarray, detail: np.ndarray
) -> None:
    """The tokens of the next picture that show a detail should know it, and which picture they belong to."""
    start, name = len(out.ids), conversation.names[picture]
    color, shape, digit = (start + int(i) for i in detail)
    for here in (color, shape, digit):
        out.probes["number"][here] = conversation.numbers[picture] - 1
        out.probes["name"][here] = NAME_ID.get(name, NONE) if name else NONE
    for here in (color, shape):  # both, since pictures are also asked for by both
        out.probes["color"][here] = int(labels[0])
        out.probes["shape"][here] = int(labels[1])
    out.probes["digit"][digit] = int(labels[2])


def _where_to_look(target: Target, values: dict[str, list[int]], shown: dict[tuple[int, int], int]) -> list[int]:
    """Where the numbers of an answer are found, if no head learns it without a hint."""
    if target.kind == "code":
        return values.get(target.name or "", [])
    if target.kind == "find" and target.color is not None and target.shape is not None:
        return [shown[target.color, target.shape]]
    return []


def _probe_reference(out: Sample, conversation: Conversation, answer: int) -> None:
    """The last position so far should know what the running question refers to."""
    target, here = conversation.targets[answer], len(out.ids) - 1
    if target.number is not None:
        out.probes["asked_number"][here] = target.number - 1
    if target.name is not None:
        out.probes["asked_name"][here] = NAME_ID.get(target.name, NONE)
    if target.color is not None and target.shape is not None:
        out.probes["asked_color"][here] = target.color
        out.probes["asked_shape"][here] = target.shape
    if target.kind in KINDS:
        out.probes["asked_kind"][here] = KINDS[target.kind]


class Probes(nn.Module):
    """Linear read-outs of the first blocks, dropped at export."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList(nn.LayerNorm(n_embd) for _ in range(2))
        self.out = nn.ModuleDict({name: nn.Linear(n_embd, n) for name, (n, _) in PROBES.items()})

    def losses(self, states: list[Tensor], samples: list[Sample]) -> dict[str, Tensor]:
        """States (b, t, d) after each block to the cross entropy of each probe that has something to read."""
        t = states[0].shape[1]
        out = {}
        for name, (_, block) in PROBES.items():
            at = [i * t + p for i, sample in enumerate(samples) for p in sample.probes[name]]
            value = [v for sample in samples for v in sample.probes[name].values()]
            if any(v != NONE for v in value):
                logits = self.out[name](self.norm[block](states[block].flatten(0, 1)[at].float()))
                out[name] = F.cross_entropy(logits, torch.tensor(value), ignore_index=NONE)
        return out


class Looking:
    """Attention that also tells how well heads of one block look at what some answers need.

    Facts, and the one picture with a colour and a shape, are few tokens among hundreds: without this hint no head finds
    them, and nothing is learned from them.
    """

    block = 2

    def __init__(self, n_head: int) -> None:
        self.heads = slice(n_head // 2, n_head)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == self.block:
            self._q, self._k = q[:, self.heads], k[:, self.heads]
        return causal_attention(layer, q, k, v)

    def loss(self, samples: list[Sample]) -> Tensor | None:
        """Cross entropy of the attention weights, or None if no answer has such a hint."""
        at = [(i, here, there) for i, sample in enumerate(samples) for here, there in sample.looks]
        if not at:
            return None
        row, here, there = torch.tensor(at).T
        scores = torch.einsum("nhd,nhtd->nht", self._q[row, :, here].float(), self._k[row].float())
        scores = scores * self._q.shape[-1] ** -0.5
        future = torch.arange(scores.shape[-1]) > here[:, None]
        scores = scores.masked_fill(future[:, None], -torch.inf)
        return F.cross_entropy(scores.flatten(0, 1), there.repeat_interleave(scores.shape[1]))


def embed(model: LanguageModel, projector: Projector, features: Tensor, ids: Tensor, feature: Tensor) -> Tensor:
    """Token embeddings (b, t, d) with the projected features (rows of the flat cache) in their places."""
    x = model.token_embd(ids)
    where = feature >= 0
    return x.masked_scatter(where[..., None], projector(features[feature[where]].float()).to(x.dtype))


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (b, t), feature (b, t), pos (b, t, 3) and target (b, t), padded on the right."""
    t = max(len(s.ids) for s in samples)

    def pad(rows: list[list[Any]], value: Any) -> Tensor:
        return torch.tensor([row + [value] * (t - len(row)) for row in rows])

    return (
        pad([s.ids for s in samples], tokenizer().id[PAD]),
        pad([s.feature for s in samples], -1),
        pad([s.pos for s in samples], (0, 0, 0)),
        pad([s.target for s in samples], NONE),
    )


class LanguageTraining:
    """Language model, projector and probes in training: everything that a checkpoint holds."""

    parts = ("model", "projector", "probes", "optimizer", "progress")

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.rng = shape, random.Random(seed)
        self.model = LanguageModel(shape.text, len(tokenizer()))
        self.projector = Projector(shape)
        self.probes, self.progress = Probes(shape.text.n_embd), Progress()
        matrices = [p for p in [*self.model.blk.parameters(), *self.projector.parameters()] if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        parts = nn.ModuleList([self.model, self.projector, self.probes])
        self.rest = [p for p in parts.parameters() if id(p) not in chosen]
        self.optimizer = MuonAdamW(matrices, self.rest, lr_muon=0.02, lr_adam=3e-3)
        self.levels = [n for n in LEVELS if n <= shape.max_pictures]
        self.level, self.recent = 0, deque[float](maxlen=25)  # share of right looked-up tokens in the last batches

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).state_dict() for name in self.parts}
        return state | {"level": self.level, "recent": list(self.recent), "rng": self.rng.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])
        self.level, self.recent = state["level"], deque(state["recent"], maxlen=25)
        self.rng.setstate(state["rng"])

    def run(self, features: Features, labels: np.ndarray, minutes: float, save: Callable[[], None]) -> None:
        """Train on conversations over the cached pictures, labels (n, 3), until the given time is used up.

        ``save`` is called every few minutes and at the end.
        """
        flat, detail = features.values.flatten(0, 1), features.detail.numpy()
        looking = Looking(self.shape.text.n_head)
        self.progress.begin(minutes)
        while (share := self.progress.share()) < 1.0:
            largest = self.levels[self.level]
            n_pictures = largest if self.rng.random() < 0.75 else self.rng.choice(self.levels[: self.level + 1])
            samples = self._draw(n_pictures, labels, detail)
            report = self._step(samples, flat, looking, schedule(share))
            if n_pictures == largest:
                self.recent.append(report["right"])
            if self.progress.step % 25 == 0:
                average = sum(self.recent) / max(1, len(self.recent))
                print(
                    f"language step {self.progress.step} {share:.1%} pictures {n_pictures} looked-up {average:.3f} "
                    + " ".join(f"{name} {value:.2f}" for name, value in report.items()),
                    flush=True,
                )
            self._advance(share)
            if self.progress.advance():
                save()
        save()

    def _draw(self, n_pictures: int, labels: np.ndarray, detail: np.ndarray) -> list[Sample]:
        n_tokens = n_pictures * (8 + self.shape.vision.n_tokens) + 13 * N_QUESTIONS + 40
        samples = []
        for _ in range(max(4, round(TOKENS_PER_BATCH / n_tokens))):
            renumber = self.rng.random() < 0.5
            conversation = make_conversation(self.rng, labels, n_pictures, N_QUESTIONS, renumber=renumber)
            samples.append(encode(conversation, self.shape, labels, detail))
        return samples

    def _step(self, samples: list[Sample], flat: Tensor, looking: Looking, scale: float) -> dict[str, float]:
        """One update; returns the share of right looked-up tokens and the losses."""
        ids, feature, pos, target = collate(samples)
        where = target != NONE
        with torch.autocast("cpu", torch.bfloat16):
            x = embed(self.model, self.projector, flat, ids, feature)
            states, last = self.model(x, pos, looking)
            logits = self.model.logits(last[where])
        wanted = target[where]
        weight = torch.where(wanted == tokenizer().id[END], END_WEIGHT, 1.0)
        loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weight).sum() / weight.sum()
        hints = self.probes.losses(states, samples)
        if (look := looking.loss(samples)) is not None:
            hints["look"] = look
        size = x[feature >= 0].float().pow(2).mean()  # keep the projector's output small: float16 has to hold it
        (loss + PROBE_WEIGHT * torch.stack(list(hints.values())).sum() + 0.01 * size).backward()
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.optimizer.step(scale)

        content = torch.tensor([c for s in samples for c, t in zip(s.content, s.target, strict=True) if t != NONE])
        right = (logits.argmax(-1) == wanted)[content].float().mean()
        report = {"right": right, "loss": loss, "size": size, **hints}
        return {name: value.item() for name, value in report.items()}

    def _advance(self, share: float) -> None:
        """Larger albums once these are learned, or at the latest when their time has come."""
        learned = len(self.recent) >= 15 and sum(self.recent) / len(self.recent) > ADVANCE_AT
        part = (self.level + 1) / max(1, len(self.levels) - 1)
        overdue = share > LAST_ADVANCE * part**0.5  # the first step, looking things up at all, takes longest
        if (learned or overdue) and self.level + 1 < len(self.levels):
            self.level += 1
            self.recent.clear()
