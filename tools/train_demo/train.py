"""The language stage: pictures as cached features, a curriculum over album sizes, auxiliary probes after block 1."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_csp.demo.albums import NAMES, QUESTIONS
from edge_csp.demo.scenes import COLORS, SHAPES

from .albums import MAX_PICTURES, Conversation, make_conversation, tokenizer
from .chat import ASSISTANT, END, PAD, segments
from .language import N_EMBD as N_EMBD_TEXT
from .language import LanguageModel, causal_attention
from .optim import MuonAdamW, cpu_seconds, schedule
from .vision import N_TOKENS, Projector

NONE = -100  # the index that cross_entropy ignores
LEVELS = (2, 3, 4, 6, 8, 10, 12, 14, 16)  # pictures per conversation
ADVANCE_AT = 0.9  # share of looked-up tokens that are right
LAST_ADVANCE = 0.6  # progress at which the largest albums begin in any case
N_QUESTIONS = 16
END_WEIGHT = 0.1
PROBE_WEIGHT = 0.3  # of each probe's cross entropy
KINDS = {kind: i for i, kind in enumerate(QUESTIONS)}
NAME_ID = {name: i for i, name in enumerate(NAMES)}

# What the probes read: number of classes, and the block behind which they read it.
PROBES = {
    "number": (MAX_PICTURES, 0),  # picture tokens: their picture's number …
    "name": (len(NAMES), 1),  # … who was introduced before it (not merely mentioned, so it takes two blocks) …
    "color": (len(COLORS), 0),  # … and what it shows
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
    pos: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)  # token to predict next, or NONE
    content: list[bool] = field(default_factory=list)  # the answer token that has to be looked up
    looks: list[tuple[int, int]] = field(default_factory=list)  # (position, where the fact stands that it needs)
    probes: dict[str, dict[int, int]] = field(default_factory=lambda: {name: {} for name in PROBES})


def _is_content(text: str) -> bool:
    return text.strip(" Ġ").lower() in _CONTENT


_CONTENT = {*COLORS, *SHAPES, *(str(i) for i in range(100))}


def encode(conversation: Conversation, labels: np.ndarray, rng: random.Random, keep: float) -> Sample:
    """Tokenise a conversation; of every picture's tokens a random share ``keep`` stays, at its true positions."""
    tok, out = tokenizer(), Sample()
    n_keep = max(1, round(keep * N_TOKENS))
    position, picture, answer = 0, -1, -1
    values: dict[str, list[int]] = {}  # name -> where the values of the fact about it stand

    def push(token: int, feature: int = -1, learn: bool = False) -> None:
        nonlocal position
        if learn:  # the position before learns to predict this token
            out.target[-1] = token
            out.content[-1] = _is_content(tok.tokens[token])
        out.ids.append(token)
        out.feature.append(feature)
        out.pos.append(position)
        out.target.append(NONE)
        out.content.append(False)
        position += 1

    for segment in segments(conversation.messages, conversation.numbers):
        if segment.kind == "control":
            push(tok.id[segment.text], learn=segment.text == END)
            answer += segment.text == ASSISTANT
        elif segment.kind == "image":
            picture += 1
            row = conversation.pictures[picture]
            kept = range(N_TOKENS) if n_keep >= N_TOKENS else sorted(rng.sample(range(N_TOKENS), n_keep))
            start, probed = position, set(rng.sample(list(kept), min(6, n_keep)))
            for i in kept:
                position = start + i
                if i in probed:
                    here = len(out.ids)
                    out.probes["number"][here] = conversation.numbers[picture] - 1
                    name = conversation.names[picture]
                    out.probes["name"][here] = NAME_ID.get(name, NONE) if name else NONE
                    for probe, value in zip(("color", "shape", "digit"), labels[row], strict=True):
                        out.probes[probe][here] = int(value)
                push(tok.id[PAD], feature=row * N_TOKENS + i)
            position = start + N_TOKENS
        else:
            learn = segment.kind == "answer"
            about = conversation.facts.get(segment.text.strip())
            if learn:
                _probe_reference(out, conversation, answer)
            facts = iter(values.get(conversation.targets[answer].name or "", []) if learn else [])
            if learn and conversation.targets[answer].kind != "code":
                facts = iter([])
            for token in tok.encode(segment.text):
                if learn and tok.tokens[token].isdigit() and (where := next(facts, None)) is not None:
                    out.looks.append((len(out.ids) - 1, where))
                push(token, learn=learn)
                if about is not None and tok.tokens[token].isdigit():
                    values.setdefault(about, []).append(len(out.ids) - 1)
                    out.probes["fact_value"][len(out.ids) - 1] = int(tok.tokens[token])
                    out.probes["fact_name"][len(out.ids) - 1] = NAME_ID.get(about, NONE)
                if learn:
                    _probe_reference(out, conversation, answer)
    return out


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
    """Attention that also tells how well one block's KV head looks at the facts that answers need.

    Facts are few tokens among hundreds: without this hint no head finds them, and nothing is learned from them.
    """

    block, heads = 2, slice(2, 4)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer == self.block:
            self._q, self._k = q[:, self.heads], k[:, self.heads]
        return causal_attention(layer, q, k, v)

    def loss(self, samples: list[Sample]) -> Tensor | None:
        """Cross entropy of the attention weights, or None if no answer needs a fact."""
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
    """ids, feature, pos, target, each (b, t), padded on the right."""
    t = max(len(s.ids) for s in samples)

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (t - len(row)) for row in rows])

    return (
        pad([s.ids for s in samples], tokenizer().id[PAD]),
        pad([s.feature for s in samples], -1),
        pad([s.pos for s in samples], 0),
        pad([s.target for s in samples], NONE),
    )


@dataclass
class Trained:
    model: LanguageModel
    projector: Projector
    probes: Probes


def train_language(
    features: Tensor,
    labels: np.ndarray,
    seed: int,
    minutes: float,
    save: Callable[[Trained], None],
    tokens_per_batch: int = 8192,
    start_from: Trained | None = None,
) -> Trained:
    """Train for the given time on conversations over the cached pictures.

    features (n, 64, 128) bfloat16, labels (n, 3). ``save`` is called every few minutes and at the end.
    """
    rng = random.Random(seed)
    trained = start_from or Trained(LanguageModel(len(tokenizer())), Projector(N_EMBD_TEXT), Probes(N_EMBD_TEXT))
    model, projector, probes = trained.model, trained.projector, trained.probes
    parts = nn.ModuleList([model, projector, probes])
    matrices = [p for p in [*model.blk.parameters(), *projector.parameters()] if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parts.parameters() if id(p) not in chosen]
    optimizer = MuonAdamW(matrices, rest, lr_muon=0.02, lr_adam=3e-3)
    flat, looking = features.flatten(0, 1), Looking()
    end = tokenizer().id[END]
    level, recent, start, step, saved = 0, deque[float](maxlen=25), cpu_seconds(), 0, 0.0
    while (progress := (cpu_seconds() - start) / (60 * minutes)) < 1.0:
        n_pictures = LEVELS[level] if rng.random() < 0.75 else rng.choice(LEVELS[: level + 1])
        keep = 1.0 if rng.random() < (0.15 if progress < 0.6 else 0.5) else rng.uniform(0.2, 0.8)
        n_tokens = n_pictures * (8 + keep * N_TOKENS) + 13 * N_QUESTIONS + 40
        samples = []
        for _ in range(max(4, round(tokens_per_batch / n_tokens))):
            conversation = make_conversation(rng, labels, n_pictures, N_QUESTIONS, renumber=rng.random() < 0.5)
            samples.append(encode(conversation, labels, rng, keep))
        ids, feature, pos, target = collate(samples)
        with torch.autocast("cpu", torch.bfloat16):
            x = embed(model, projector, flat, ids, feature)
            states, last = model(x, pos, looking)
            where = target != NONE
            logits = model.logits(last[where])
        wanted = target[where]
        weight = torch.where(wanted == end, END_WEIGHT, 1.0)
        loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weight).sum() / weight.sum()
        probe_losses = probes.losses(states, samples)
        if (look := looking.loss(samples)) is not None:
            probe_losses["look"] = look
        probe_loss = torch.stack(list(probe_losses.values())).sum()
        size = x[feature >= 0].float().pow(2).mean()  # keep the projector's output small: float16 has to hold it
        (loss + PROBE_WEIGHT * probe_loss + 0.01 * size).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        optimizer.step(schedule(progress))

        content = torch.tensor([c for s in samples for c, t in zip(s.content, s.target, strict=True) if t != NONE])
        right = (logits.argmax(-1) == wanted)[content].float().mean().item()
        if n_pictures == LEVELS[level]:
            recent.append(right)
        if step % 25 == 0:
            average = sum(recent) / max(1, len(recent))
            print(
                f"language step {step} {progress:.1%} pictures {n_pictures} keep {keep:.2f} loss {loss.item():.3f} "
                f"looked-up {average:.3f} size {size.item():.2f} probes "
                + " ".join(f"{name} {value.item():.2f}" for name, value in probe_losses.items()),
                flush=True,
            )
        learned = len(recent) >= 15 and sum(recent) / len(recent) > ADVANCE_AT
        overdue = progress > LAST_ADVANCE * (level + 1) / (len(LEVELS) - 1)
        if (learned or overdue) and level + 1 < len(LEVELS):
            level += 1
            recent.clear()
        if cpu_seconds() - start - saved > 180:
            saved = cpu_seconds() - start
            save(trained)
        step += 1
    save(trained)
    return trained
