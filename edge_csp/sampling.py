"""Sampling with llama.cpp's samplers, in llama.cpp's order and with its defaults."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_csp import native
from edge_csp.errors import SamplingError
from edge_csp.model import VisionModel


@dataclass(frozen=True)
class Sampling:
    """Settings; names and defaults are those of llama.cpp.

    temperature: 0 takes the most likely token. top_k: 0 is off. top_p: 1.0 is off. min_p: 0.0 is off.
    repeat_penalty: 1.0 is off; over the last repeat_last_n tokens. seed: -1 takes a new one every time.
    grammar: GBNF text. json_schema: JSON text, turned into a grammar.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = -1
    grammar: str | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0, 100), ("top_k", 0, 2**31 - 1), ("top_p", 0, 1), ("min_p", 0, 1),
            ("repeat_penalty", 0.01, 100), ("repeat_last_n", -1, 2**31 - 1), ("seed", -1, 2**32 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise SamplingError(f"{name} is {value}, but must be from {low} to {high}")
        if self.grammar and self.json_schema:
            raise SamplingError("both a grammar and a JSON schema are given; use one of them")


class Sampler:
    """A chain of llama.cpp's samplers for one answer; close it."""

    def __init__(self, settings: Sampling, model: VisionModel, prompt_tokens: Iterable[int] = ()) -> None:
        """prompt_tokens: text tokens before the answer, which the repeat penalty counts too.

        Raises SamplingError if llama.cpp refuses the grammar.
        """
        import llama_cpp

        self._chain: Any = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        grammar = settings.grammar or (_schema_to_grammar(settings.json_schema) if settings.json_schema else None)
        self._has_grammar = bool(grammar)
        self._n_vocab = model.n_vocab
        if grammar:
            native.clear_log_errors()
            sampler = llama_cpp.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
            if not sampler:
                self.close()
                raise SamplingError(f"the grammar cannot be used: {native.last_log_error()}")
            self._add(sampler)
        if settings.repeat_penalty != 1.0:
            penalties = llama_cpp.llama_sampler_init_penalties(
                model.n_vocab, settings.repeat_last_n, settings.repeat_penalty, 0.0, 0.0
            )
            for token in prompt_tokens:
                llama_cpp.llama_sampler_accept(penalties, token)
            self._add(penalties)
        if settings.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if settings.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(settings.top_k))
        self._add(llama_cpp.llama_sampler_init_top_p(settings.top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(settings.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(settings.temperature))
        self._add(llama_cpp.llama_sampler_init_dist(settings.seed % 2**32))  # 2**32 - 1 is llama.cpp's "random"

    def _add(self, sampler: Any) -> None:
        import llama_cpp

        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Any) -> int:
        """The next token, from the logits of the last decode of a llama_context pointer.

        Raises SamplingError if the grammar allows no token: llama.cpp would abort the process.
        """
        import llama_cpp

        if not self._has_grammar:
            return int(llama_cpp.llama_sampler_sample(self._chain, context, -1))
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(self._n_vocab,))
        candidates = np.zeros(self._n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        candidates["id"], candidates["logit"] = np.arange(self._n_vocab), logits
        data = candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        array = llama_cpp.llama_token_data_array(data, self._n_vocab, -1, False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        if not math.isfinite(chosen.logit):
            raise SamplingError("the grammar allows no token of this model here")
        llama_cpp.llama_sampler_accept(self._chain, chosen.id)
        return int(chosen.id)

    def close(self) -> None:
        """Free the chain. A second call does nothing."""
        import llama_cpp

        if self._chain:
            llama_cpp.llama_sampler_free(self._chain)
        self._chain = None


def _schema_to_grammar(schema: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        json.loads(schema)
    except ValueError as error:
        raise SamplingError(f"the JSON schema is not JSON: {error}") from error
    try:
        grammar: str = json_schema_to_gbnf(schema)
    except Exception as error:  # the converter raises whatever a strange schema leads to
        raise SamplingError(f"the JSON schema cannot be turned into a grammar: {error}") from error
    return grammar
