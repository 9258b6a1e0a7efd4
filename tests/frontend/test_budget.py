"""Budgets: what users write -> cells."""

from contextlib import suppress
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_csp.budget import KV_TYPES, kv_bytes_per_cell, parse_budget, protected_cells
from edge_csp.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "n_cell", "cells"),
    [
        ("20%", 1000, 200),
        ("0.2", 1000, 200),
        (".2", 1000, 200),
        (" 20 % ", 1000, 200),
        ("29%", 100, 29),  # 0.29 * 100 is below 29 in binary floats
        ("0.1%", 10, 1),  # at least one cell
        ("0.5", 5, 2),
        ("1", 1000, 1),  # whole numbers are cells
        ("1.0", 1000, 1000),
        ("1.", 1000, 1000),
        ("100%", 1000, 1000),
        ("512", 1000, 512),
        ("512c", 1000, 512),
        ("512 cells", 1000, 512),
        ("512", 100, 100),
        ("512", 0, 0),
        ("20%", 0, 0),
        ("1KiB", 1000, 10),
        ("1kb", 1000, 10),
        ("1.5KB", 1000, 15),
        ("64MiB", 10**9, 671088),
        ("1.5GB", 10**9, 15_000_000),
        ("100B", 1000, 1),
        ("1TiB", 1000, 1000),
    ],
)
def test_budget_in_cells(text: str, n_cell: int, cells: int) -> None:
    assert parse_budget(text).cells(n_cell, bytes_per_cell=100) == cells


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", ("'0'", "above 0")),
        ("0%", ("'0%'", "above 0")),
        ("0.0", ("'0.0'", "above 0")),
        ("0MiB", ("'0MiB'", "above 0")),
        ("-1", ("'-1'", "negative")),
        ("-20%", ("'-20%'", "negative")),
        ("200%", ("'200%'", "100%")),
        ("100.1%", ("'100.1%'", "100%")),
        ("1.5", ("'1.5'", "1.0")),
        ("nan", ("'nan'", "not a number")),
        ("inf", ("'inf'", "not a number")),
        ("-inf", ("'-inf'", "not a number")),
        ("", ("''", "not a number")),
        (" ", ("' '", "not a number")),
        ("abc", ("'abc'", "not a number")),
        ("%", ("'%'", "not a number")),
        (".", ("'.'", "not a number")),
        ("1e3", ("'1e3'", "not a number")),
        ("1,5%", ("'1,5%'", "not a number")),
        ("٣", ("not a number",)),
        ("5\n6", (r"'5\n6'", "not a number")),
        ("9" * 5000, ("not a number",)),
        ("512M", ("'512M'", "unknown unit", "MiB")),
        ("5 apples", ("unknown unit", "'apples'")),
        ("1.5c", ("'1.5c'", "whole number")),
    ],
)
def test_budget_refused(text: str, words: tuple[str, ...], refuses) -> None:
    with refuses(BudgetError, "budget", *words):
        parse_budget(text)


def test_budget_smaller_than_a_cell(refuses) -> None:
    with refuses(BudgetError, "1KiB", 1024, 1025):
        parse_budget("1KiB").cells(10, bytes_per_cell=1025)
    with refuses(BudgetError, "0.5B", 0, 4):
        parse_budget("0.5B").cells(10, bytes_per_cell=4)
    assert parse_budget("1KiB").cells(10, bytes_per_cell=1024) == 1


def test_budget_of_nonsense_cells(refuses) -> None:
    with refuses(BudgetError, "-1 cells"):
        parse_budget("1").cells(-1, bytes_per_cell=1)
    with refuses(BudgetError, "0 bytes"):
        parse_budget("1KB").cells(1, bytes_per_cell=0)


def test_budget_prints_as_given() -> None:
    assert str(parse_budget(" 20% ")) == "20%"


@given(st.integers(1, 10_000), st.integers(1, 10**7))
def test_percent_is_exact(hundredths: int, n_cell: int) -> None:
    text = f"{hundredths // 100}.{hundredths % 100:02}%"
    assert parse_budget(text).cells(n_cell, 1) == max(1, floor(Fraction(hundredths, 10_000) * n_cell))


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(BudgetError):
        budget = parse_budget(text)
        assert budget.value > 0
        if budget.kind != "bytes" or budget.value >= 1:
            assert 1 <= budget.cells(100, bytes_per_cell=1) <= 100


@pytest.mark.parametrize(
    ("type_k", "type_v", "n_bytes"),
    [
        ("f16", "f16", 524_288),  # LLaVA-1.5-7B: 512 KiB
        ("f32", "f32", 1_048_576),
        ("bf16", "F16", 524_288),
        ("q8_0", "q8_0", 278_528),
        ("q4_0", "q8_0", 147_456 // 2 + 278_528 // 2),
        ("q5_0", "q5_0", 180_224),
        ("q5_1", "q4_1", 98_304 + 81_920),
        ("iq4_nl", "iq4_nl", 147_456),
    ],
)
def test_bytes_per_cell(type_k: str, type_v: str, n_bytes: int) -> None:
    assert kv_bytes_per_cell(32, 32, 128, 128, type_k, type_v) == n_bytes


def test_bytes_per_cell_per_layer() -> None:
    assert kv_bytes_per_cell(3, [2, 0, 4], 64, 32) == 6 * (64 + 32) * 2


def test_bytes_per_cell_refused(refuses) -> None:
    with refuses(BudgetError, "K", "'q3_k'", *KV_TYPES):
        kv_bytes_per_cell(1, 1, 64, 64, "q3_k")
    with refuses(BudgetError, "V", "q8_0", 32, 80):
        kv_bytes_per_cell(1, 1, 64, 80, "f16", "q8_0")
    with refuses(BudgetError, 0):
        kv_bytes_per_cell(1, 1, 0, 0)
    with refuses(BudgetError, 2, 3):
        kv_bytes_per_cell(3, [1, 1], 64, 64)


def test_types_agree_with_gguf() -> None:
    constants = pytest.importorskip("gguf.constants")
    for name, sizes in KV_TYPES.items():
        assert constants.GGML_QUANT_SIZES[constants.GGMLQuantizationType[name.upper()]] == sizes


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, (32, 4)), (64, (16, 4)), (20, (5, 2)), (7, (1, 1)), (2, (1, 1)), (1, (1, 0))],
)
def test_protected_cells(budget: int, expected: tuple[int, int]) -> None:
    assert protected_cells(budget, n_recent=32, n_sink=4) == expected


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_protected_cells_leave_a_choice(budget: int, n_recent: int, n_sink: int) -> None:
    recent, sink = protected_cells(budget, n_recent=n_recent, n_sink=n_sink)
    assert recent >= 1
    assert recent + sink <= max(min(2, budget), budget // 4 + budget // 8)
    assert sink > 0 or n_sink == 0 or budget == 1


@pytest.mark.parametrize(("n_recent", "n_sink"), [(-1, 0), (0, -1)])
def test_protected_cells_refused(n_recent: int, n_sink: int, refuses) -> None:
    with refuses(BudgetError, n_recent, n_sink):
        protected_cells(10, n_recent=n_recent, n_sink=n_sink)
