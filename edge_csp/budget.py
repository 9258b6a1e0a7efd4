"""Budgets: the one place that turns what users say into cells.

    "20%", "0.2"         a share of the cells in use
    "512", "512c"        cells
    "64MiB", "1.5GB"     bytes of KV cache (KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB powers of 1000; B)

Whole numbers are cells; a decimal point or a percent sign makes a share. So "1" is one cell, and "1.0" and "100%" are
everything. Shares are decimal fractions as written, never binary floats: 29% of 100 cells are 29, not 28.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Literal

from edge_csp.errors import BudgetError

__all__ = ["KV_TYPES", "Budget", "kv_bytes_per_cell", "parse_budget", "protected_cells"]

KV_TYPES: dict[str, tuple[int, int]] = {  # name -> (values per block, bytes per block), as in ggml
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
"""Cache types of llama.cpp that edge-csp knows."""

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)\s*([a-z%]*)", re.ASCII | re.IGNORECASE)
_BYTES = {"b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_CELLS = {"c", "cell", "cells"}
MIN_CELLS = 16
"""Cells of the smallest bounded cache."""
_EXAMPLES = "write 20%, 0.2, 512 (cells) or 64MiB"
_MAX_TEXT = 32  # longer texts are no budget, and huge numbers are slow to read


@dataclass(frozen=True)
class Budget:
    """How much of the KV cache may stay.

    kind: "ratio" of the cells in use, "cells", or "bytes". value: exact, > 0; a ratio is at most 1. text: as given.
    """

    kind: Literal["ratio", "cells", "bytes"]
    value: Fraction
    text: str

    def cells(self, n_cell: int, bytes_per_cell: int, least: int = 1) -> int:
        """Return the cells that may stay of `n_cell` cells in use, 1 .. n_cell (0 if there are none).

        Rounded down, so the result never takes more than was asked for; but at least `least` cells stay of a ratio.
        bytes_per_cell: K and V of all layers, see `kv_bytes_per_cell`. Only looked at when the budget is in bytes.

        Raises BudgetError if the budget is in bytes and too small for one cell.
        """
        if n_cell < 0 or (self.kind == "bytes" and bytes_per_cell < 1):
            raise BudgetError(f"cannot budget {n_cell} cells of {bytes_per_cell} bytes")
        if self.kind == "ratio":
            wanted = max(1, least, floor(self.value * n_cell))
        elif self.kind == "cells":
            wanted = int(self.value)
        else:
            wanted = floor(self.value / bytes_per_cell)
            if wanted < 1:
                raise BudgetError(
                    f"budget {self.text} is {floor(self.value)} bytes, but one cell of this model takes "
                    f"{bytes_per_cell} bytes"
                )
        return min(wanted, n_cell)

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """Read a budget as users write it; see the head of this module.

    Raises BudgetError if `text` is no number with a known unit, not above zero, or a share above 100%.
    """
    stripped = text.strip()
    shown = repr(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "...")
    if re.match(r"-\s*\.?\d", stripped):
        raise BudgetError(f"budget {shown} is negative; it must be above 0 ({_EXAMPLES})")
    match = _NUMBER.fullmatch(stripped) if len(text) <= _MAX_TEXT else None
    if match is None:
        raise BudgetError(f"budget {shown} is not a number with a unit: {_EXAMPLES}")
    digits, unit = match[1], match[2].lower()
    number = Fraction(digits)
    if number == 0:
        raise BudgetError(f"budget {shown} keeps nothing; it must be above 0 ({_EXAMPLES})")
    if unit in _BYTES:
        return Budget("bytes", number * _BYTES[unit], stripped)
    if unit == "%" or (unit == "" and "." in digits):
        ratio = number / 100 if unit == "%" else number
        if ratio > 1:
            hint = "the limit is 100%" if unit == "%" else "the limit is 1.0 (whole numbers without a point are cells)"
            raise BudgetError(f"budget {shown} is more than everything: {hint}")
        return Budget("ratio", ratio, stripped)
    if unit == "" or unit in _CELLS:
        if number.denominator != 1:
            raise BudgetError(f"budget {shown} is not a whole number of cells")
        return Budget("cells", number, stripped)
    raise BudgetError(f"budget {shown} has the unknown unit {match[2]!r}: use %, c, B, KB, MB, GB, KiB, MiB or GiB")


def kv_bytes_per_cell(
    n_layer: int,
    n_head_kv: int | Sequence[int],
    head_dim_k: int,
    head_dim_v: int,
    type_k: str = "f16",
    type_v: str = "f16",
) -> int:
    """Return the bytes that one cell takes in the KV cache: K and V of all layers.

    n_head_kv: KV heads, one number for all layers or one per layer (0 for a layer that does not hold every cell, see
    GgufInfo.n_head_kv_full; a model of such layers only gives 0).
    head_dim_k, head_dim_v: values per head. type_k, type_v: see `KV_TYPES`, upper or lower case.

    Raises BudgetError for an unknown type, and if a head is not a multiple of the type's block.
    """
    heads = [n_head_kv] * n_layer if isinstance(n_head_kv, int) else list(n_head_kv)
    if len(heads) != n_layer:
        raise BudgetError(f"{len(heads)} numbers of KV heads were given for {n_layer} layers")
    if not any(heads):
        return 0
    per_head = _row_bytes("K", head_dim_k, type_k) + _row_bytes("V", head_dim_v, type_v)
    return sum(heads) * per_head


def _row_bytes(what: str, head_dim: int, type_name: str) -> int:
    """Return the bytes of one head's row of `head_dim` values."""
    if type_name.lower() not in KV_TYPES:
        raise BudgetError(f"{what} cache type {type_name!r} is unknown: use {', '.join(KV_TYPES)}")
    block, size = KV_TYPES[type_name.lower()]
    if head_dim < 1 or head_dim % block:
        raise BudgetError(
            f"{what} cache type {type_name} stores blocks of {block} values, but a head has {head_dim} values"
        )
    return head_dim // block * size


def protected_cells(budget: int, *, n_recent: int, n_sink: int) -> tuple[int, int]:
    """Return the last and the first cells that stay in any case, (n_recent, n_sink), of `budget` cells.

    As many as asked for, but at most 1/4 of the budget for the last ones and 1/8 for the first ones, so that there is
    much left to choose. The last cell always stays, and so does the first one if the budget is more than one cell: in
    real models it takes a third of all attention, and answers fall apart without it.

    Raises BudgetError if a number is negative.
    """
    if n_recent < 0 or n_sink < 0:
        raise BudgetError(f"n_recent is {n_recent} and n_sink {n_sink}; both must be 0 or more")
    return max(1, min(n_recent, budget // 4)), min(n_sink, max(int(budget > 1), budget // 8))
