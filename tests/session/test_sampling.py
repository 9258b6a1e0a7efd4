"""Sampling: llama.cpp's samplers behave as set, and a grammar never brings the process down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_csp import Context, Sampling, Session, VisionModel
from edge_csp.errors import SamplingError


@pytest.fixture(scope="module")
def context(demo_files: tuple[Path, Path]) -> Iterator[Context]:
    with VisionModel(*demo_files, n_threads=1) as model, Context(model, n_ctx=512) as opened:
        yield opened


def answer(context: Context, n_predict: int = 24, **settings: object) -> str:
    context.clear()
    session = Session(context, sampling=Sampling(**settings))  # type: ignore[arg-type]
    return "".join(session.ask("What is the code of Zed?", n_predict=n_predict))


def test_seeds(context: Context) -> None:
    hot = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert answer(context, seed=1, **hot) == answer(context, seed=1, **hot)
    assert len({answer(context, seed=seed, **hot) for seed in range(4)}) > 1


def test_top_k_of_one_is_greedy(context: Context) -> None:
    assert answer(context, temperature=5.0, top_k=1, seed=3) == answer(context, temperature=0)


def test_repeat_penalty_changes_the_answer(context: Context) -> None:
    loop = {"temperature": 0, "grammar": 'root ::= ("a" | "b" | "c" | "d") root'}
    assert len(set(answer(context, repeat_penalty=50.0, **loop))) > len(set(answer(context, **loop)))


def test_grammar(context: Context) -> None:
    assert answer(context, temperature=0, grammar='root ::= "yes" | "no"') in ("yes", "no")


def test_json_schema(context: Context) -> None:
    schema = {"type": "object", "properties": {"digit": {"enum": [1, 2, 3]}}, "required": ["digit"]}
    text = answer(context, n_predict=100, temperature=0, json_schema=json.dumps(schema))
    assert json.loads(text)["digit"] in (1, 2, 3)


@pytest.mark.parametrize("settings", [{"grammar": "root ::= missing"}, {"grammar": "no grammar"}, {"json_schema": "{"}])
def test_bad_grammars_are_refused(context: Context, settings: dict[str, str]) -> None:
    with pytest.raises(SamplingError):
        answer(context, **settings)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1}, {"top_p": 1.5}, {"min_p": float("nan")}, {"repeat_penalty": 0}, {"seed": 2**32}],
)
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match=next(iter(settings))):
        Sampling(**settings)  # type: ignore[arg-type]
