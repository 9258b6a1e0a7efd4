"""The chat format and the tokenizer, each written once for the trainer and once for the GGUF file.

``segments`` is what the model is trained on; ``TEMPLATE`` is the same format as jinja, stored in the GGUF; a test holds
them together. ``Tokenizer`` does in Python what llama.cpp does with ``tokenizer.ggml.model = gpt2`` and
``tokenizer.ggml.pre = llama-bpe``: split by a regular expression, take the piece if the vocabulary has it whole, else
fall back to its bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

MEDIA = "<__media__>"
BOS, USER, ASSISTANT, END, PAD = CONTROL_TOKENS = ("<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>")

Message = dict[str, Any]

# Pictures are numbered over the whole conversation; consecutive messages that are not the assistant's are one turn.
TEMPLATE = """\
{%- set ns = namespace(n=0, open=false, gap=false) -%}
{{- '<|bos|>' -}}
{%- for m in messages -%}
  {%- if m.content is string -%}
    {%- set parts = [{'type': 'text', 'text': m.content}] -%}
  {%- else -%}
    {%- set parts = m.content -%}
  {%- endif -%}
  {%- if m.role == 'assistant' -%}
    {%- set ns.open = false -%}
    {{- '<|assistant|>' -}}
    {%- for p in parts -%}{{- p.text | trim -}}{%- endfor -%}
    {{- '<|end|>' -}}
  {%- else -%}
    {%- if not ns.open -%}
      {%- set ns.open = true -%}
      {%- set ns.gap = false -%}
      {{- '<|user|>' -}}
    {%- endif -%}
    {%- for p in parts -%}
      {%- if p.type == 'text' -%}{%- set text = p.text -%}{%- else -%}{%- set text = '<__media__>' -%}{%- endif -%}
      {%- for piece in text.split('<__media__>') -%}
        {%- if not loop.first -%}
          {%- set ns.n = ns.n + 1 -%}
          {{- '\\n' if ns.gap else '' -}}
          {{- 'Picture ' ~ ns.n ~ ': <__media__>' -}}
          {%- set ns.gap = true -%}
        {%- endif -%}
        {%- if piece | trim -%}
          {{- '\\n' if ns.gap else '' -}}
          {{- piece | trim -}}
          {%- set ns.gap = true -%}
        {%- endif -%}
      {%- endfor -%}
    {%- endfor -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


class Segment(NamedTuple):
    """A stretch of the prompt; ``image`` segments stand for one picture's embeddings, in order of appearance."""

    kind: Literal["control", "header", "image", "text", "answer"]
    text: str


def segments(messages: Sequence[Message], numbers: Iterable[int] | None = None, cue: bool = False) -> Iterator[Segment]:
    """Yield the prompt of a conversation; ``numbers`` replaces 1, 2, 3… and ``cue`` asks for an answer at the end."""
    count = iter(numbers if numbers is not None else range(1, 10**6))
    open_turn = gap = False
    yield Segment("control", BOS)
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "assistant":
            open_turn = False
            yield Segment("control", ASSISTANT)
            yield Segment("answer", "".join(part["text"].strip() for part in parts))
            yield Segment("control", END)
            continue
        if not open_turn:
            open_turn, gap = True, False
            yield Segment("control", USER)
        for part in parts:
            text = part["text"] if part["type"] == "text" else MEDIA
            for i, piece in enumerate(text.split(MEDIA)):
                if i > 0:
                    yield Segment("header", ("\n" if gap else "") + f"Picture {next(count)}: ")
                    yield Segment("image", MEDIA)
                    gap = True
                if piece.strip():
                    yield Segment("text", ("\n" if gap else "") + piece.strip())
                    gap = True
    if cue:
        yield Segment("control", ASSISTANT)


# ---- tokenizer -------------------------------------------------------------------------------------------------------

_PIECE = re.compile(
    r"'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])"
    r"|(?:[^\w\r\n]|_)?[^\W\d_]+|\d{1,3}| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable stand-in of each byte in a gpt2 vocabulary: itself if printable, else U+0100 upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in printable]
    return tuple(chr(b) if b in printable else chr(0x100 + hidden.index(b)) for b in range(256))


def to_vocabulary_text(piece: str) -> str:
    """A piece as the vocabulary spells it: every byte by its stand-in."""
    alphabet = byte_alphabet()
    return "".join(alphabet[b] for b in piece.encode("utf-8"))


class Tokenizer:
    """256 bytes, then whole pieces, then control tokens, then padding to a multiple of 32."""

    def __init__(self, texts: Iterable[str]) -> None:
        known = set(byte_alphabet())
        pieces = {to_vocabulary_text(p) for text in texts for p in _PIECE.findall(text)} - known
        tokens = [*byte_alphabet(), *sorted(pieces), *CONTROL_TOKENS]
        self.n_used = len(tokens)
        tokens += [f"<|unused_{i}|>" for i in range(-len(tokens) % 32)]
        self.tokens = tokens
        self.id = {token: i for i, token in enumerate(tokens)}
        self.n_control = len(tokens) - self.id[CONTROL_TOKENS[0]]
        self._encode = functools.lru_cache(maxsize=100_000)(self._encode_text)

    def __len__(self) -> int:
        return len(self.tokens)

    def is_control(self, token: int) -> bool:
        return token >= len(self.tokens) - self.n_control

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text without control tokens."""
        return self._encode(text)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        out: list[int] = []
        for piece in _PIECE.findall(text):
            spelled = to_vocabulary_text(piece)
            out.extend([self.id[spelled]] if spelled in self.id else [self.id[c] for c in spelled])
        return tuple(out)

    def decode(self, tokens: Iterable[int]) -> str:
        back = {c: b for b, c in enumerate(byte_alphabet())}
        return b"".join(bytes(back[c] for c in self.tokens[t]) for t in tokens if not self.is_control(t)).decode(
            "utf-8", errors="replace"
        )
