"""Writes docs/architectures.md from what llama.cpp does with the random models of upstream's architecture test.

    EDGE_CSP_UPSTREAM=…/llama_cpp_python-0.3.36.tar.gz python -m tools.write_arch_table

It needs a C++ compiler and half a minute. A test fails when the table differs.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections import Counter
from itertools import groupby
from pathlib import Path

from tests.archs.generate import CannotGenerate
from tests.archs.sweep import Outcome, Sweep, run_sweep

TARGET = Path(__file__).parents[1] / "docs" / "architectures.md"
HEAD = """\
# Architectures

<!-- Written by tools/write_arch_table.py; change the library instead. -->

What becomes of the {n_model} random models that llama.cpp's own `tests/test-llama-archs.cpp` writes: {n_pruned} are
pruned, {n_refused} are refused by `llama_csp_init` with the reason in the table. `tests/archs/` compares all with this
table.

- pruned: recording, and keeping all cells, changes no bit of the logits. Keeping the same cells in every layer and head
  gives bit for bit what upstream's own `llama_memory_seq_rm` of the others gives (beside sliding windows without flash
  attention to 2e-6: sums run in another order). Scores equal the rows of the graph's own softmax.
- not pruned: the context computes on, bit for bit, as if nobody had asked.

All of that with and without flash attention. Memory is llama.cpp's class, without `llama_`. Windows and recurrent
states are never pruned, only the full attention beside them.

| architecture | memory | pruned | reason |
|---|---|---|---|
"""
TAIL = "llama.cpp's test writes no model of {left_out}: these are not checked here."


def text(sweep: Sweep) -> str:
    """What docs/architectures.md has to be."""
    count = Counter(outcome.status for outcome in sweep.outcomes if not outcome.flash)
    head = HEAD.format(n_model=sum(count.values()), n_pruned=count["pruned"], n_refused=count["refused"])
    by_name = groupby(sorted(sweep.outcomes, key=_architecture), key=_architecture)
    rows = [row for name, outcomes in by_name for row in _rows(name, list(outcomes))]
    left_out = ", ".join(f"`{name}`" for name in sweep.left_out)
    return (
        head + "".join(rows) + "\n" + textwrap.fill(TAIL.format(left_out=left_out), 120, break_on_hyphens=False) + "\n"
    )


def _architecture(outcome: Outcome) -> str:
    return outcome.model.rpartition("-")[0]


def _rows(name: str, outcomes: list[Outcome]) -> list[str]:
    """One row, unless experts or flash attention make a difference."""
    results = {(outcome.memory, outcome.status, outcome.reason): outcome for outcome in outcomes}
    rows = []
    for (memory, status, reason), outcome in results.items():
        kind = outcome.model.rpartition("-")[2] + (", flash attention" if outcome.flash else "")
        row = f"`{name}`" + (f" ({kind})" if len(results) > 1 else "")
        rows.append(f"| {row} | {memory} | {'yes' if status == 'pruned' else 'no'} | {reason} |\n")
    return rows


def main() -> int:
    try:
        sweep = run_sweep()
    except (CannotGenerate, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    if bad := sweep.bad:
        print("not written, because of:", *bad, sep="\n", file=sys.stderr)
        return 1
    TARGET.write_text(text(sweep), encoding="utf-8")
    print(f"wrote {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
