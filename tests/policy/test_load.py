"""Policies of the user: where they come from, and what is said about those that cannot be used."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from edge_csp.errors import PolicyError
from edge_csp.policy import POLICIES, H2oPolicy, LookMPolicy, Observation, Policy, Span, load, make_policy
from edge_csp.policy.base import BoolArray
from edge_csp.policy.check import check_policy
from edge_csp.policy.load import with_settings
from edge_csp.policy.lookm import Merge

HEAD = """\
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_csp import Observation, Policy


@dataclass(frozen=True)
class Mine(Policy):
    name: ClassVar[str] = "mine"
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})
    first: int = 3

    def pick(self, observation, n_keep, protected):
        keep = protected.copy()
        for row in keep.reshape(-1, keep.shape[-1]):
            left = n_keep - int(row.sum())
            row[np.flatnonzero(~row)[:left]] = True
        return keep
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package `mypkg.policies` on the import path; cleared from the modules afterwards."""
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").touch()
    (tmp_path / "mypkg" / "policies.py").write_text(HEAD)
    (tmp_path / "my.py").write_text(HEAD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("mypkg", "mypkg.policies", "edge_csp_policy_of_my"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("path", ["mypkg.policies:Mine", "./my.py:Mine", "my.py:Mine", "{folder}/my.py:Mine"])
def test_path(folder: Path, path: str) -> None:
    policy: Any = make_policy(path.format(folder=folder), ["first=7"])
    assert (policy.name, policy.first) == ("mine", 7)
    scores = np.zeros((1, 1, 2, 9), np.float32)
    observation = Observation(np.zeros((1, 1, 9), np.uint8), np.zeros((1, 1, 9), np.int32), scores=scores)
    assert policy.select(observation, 3, np.zeros((1, 1, 9), np.bool_)).tolist() == [[[0, 1, 8]]]


def test_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("shiny", "mypkg.policies:Mine", load.GROUP),
        EntryPoint("csp", "mypkg.policies:Mine", load.GROUP),
        EntryPoint("twice", "mypkg.policies:Mine", load.GROUP),
        EntryPoint("twice", "mypkg.policies:Other", load.GROUP),
        EntryPoint("gone", "mypkg.nothing:Mine", load.GROUP),
    ]
    monkeypatch.setattr(load, "entry_points", lambda group: EntryPoints(points).select(group=group))
    assert make_policy("shiny", first=2).name == "mine"
    assert isinstance(make_policy("csp"), POLICIES["csp"])
    with pytest.raises(PolicyError, match=r"policy twice is offered by mypkg.policies:Mine and mypkg.policies:Other"):
        make_policy("twice")
    with pytest.raises(PolicyError, match="policy gone cannot be loaded: ModuleNotFoundError"):
        make_policy("gone")
    with pytest.raises(PolicyError, match=r"there are blend, .*shiny, .*, and your own as module:Class"):
        make_policy("best")


CLASS = "@dataclass(frozen=True)\nclass Mine(Policy):\n    name: ClassVar[str] = 'mine'\n"


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("nopkg.nothing:Mine", "", "cannot be loaded: ModuleNotFoundError: No module named 'nopkg'"),
        ("mypkg.policies:Other", "", "policies.py has no 'Other'"),
        ("gone.py:Mine", "", "policy file gone.py does not exist"),
        ("mypkg.py:Mine", "", "policy file mypkg.py does not exist"),
        (":Mine", "", "policy :Mine cannot be loaded: ValueError"),
        ("my.py:", "", "my.py has no ''"),
        ("my.py:Mine", "class Mine(", "cannot be loaded: SyntaxError"),
        ("my.py:Mine", "1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("my.py:Mine", "raise SystemExit(3)", "cannot be loaded: SystemExit: 3"),
        ("my.py:np", HEAD, "is no subclass of edge_csp.Policy, but of the type module"),
        ("my.py:Path", "from pathlib import Path", "is no subclass of edge_csp.Policy, but the class Path"),
        ("my.py:Mine", HEAD + CLASS, "has no method pick"),
        ("my.py:Mine", HEAD.replace("name: Class", "title: Class"), "has no name"),
        ("my.py:Mine", HEAD.replace("@dataclass(frozen=True)", ""), "is no dataclass"),
        ("my.py:Mine", HEAD.replace('"scores"', '"score"'), r"needs frozenset\({'score'}\); it must be a frozenset of"),
        ("my.py:Mine", HEAD.replace(": int = 3", ": int"), "refuses its settings: .* 'first'"),
    ],
)
def test_what_cannot_be_loaded(folder: Path, path: str, code: str, words: str) -> None:
    (folder / "my.py").write_text(code)
    with pytest.raises(PolicyError, match=words) as caught:
        make_policy(path)
    assert "\n" not in str(caught.value)


PICK = "        keep = protected.copy()\n"


@pytest.mark.parametrize(
    ("old", "new", "offence"),
    [
        ("left = n_keep", "left = 1 + n_keep", "layer 0, head 0 keeps 11 cells instead of 10"),
        ("protected.copy()", "protected & False", r"layer 0, head 0 evicts cell \d+, which is protected"),
        ("protected.copy()", "protected", "changes its input: ValueError: assignment destination is read-only"),
        ("protected.copy()", "protected + observation.mass", "policy mine: mass was not measured"),
        ("protected.copy()", "protected + nothing", "failed: NameError: name 'nothing' is not defined"),
        ("return keep", "return keep.tolist()", "pick gave list, not bool"),
        (
            PICK,
            PICK + "        observation.tag.flags.writeable = True\n        observation.tag[0] = 1\n",
            "changes its input: tag",
        ),
        ("(~row)[:left]", "(~row)[next(COUNT):][:left]", "two calls with the same arguments give different cells"),
        (
            "(~row)[:left]",
            "(~row)[len(protected) - 1:][:left]",
            "a layer on its own and among others give different cells in layer 0, head 0",
        ),
        (
            "    def pick",
            "    def n_keep(self, budget, n_cell):\n        return n_cell - 1\n\n    def pick",
            r"n_keep\(10, 40\) is 39",
        ),
    ],
)
def test_what_breaks_the_contract(folder: Path, old: str, new: str, offence: str) -> None:
    code = HEAD.replace(old, new)
    assert code != HEAD
    (folder / "my.py").write_text(code + "\n\nCOUNT = itertools.count()\n")
    with pytest.raises(PolicyError, match=offence) as caught:
        make_policy("my.py:Mine")
    assert "mine" in str(caught.value)


@dataclass(frozen=True)
class Merging(LookMPolicy):
    """Merges in a way that is told by its setting."""

    way: str = "right"

    @property
    def merges(self) -> bool:
        return True

    def merge_rows(self, observation: Observation, k: Any, v: Any, cells: Any) -> Any:
        wrong: dict[str, Any] = {
            "short": lambda: (k[:1, :1], v),
            "doubles": lambda: (k, v.astype(float)),
            "nan": lambda: (k, v * np.nan),
            "random": lambda: (k, np.random.random(v.shape).astype(np.float32)),
            "none": lambda: None,
            "writes": lambda: (k.__iadd__(1), v),
            "right": lambda: (k + 1, v),
        }
        return wrong[self.way]()


@pytest.mark.parametrize(
    ("way", "offence"),
    [
        ("short", r"merge_rows gave k as float32 \(1, 1, 8\)"),
        ("doubles", "merge_rows gave v as float64"),
        ("nan", "merge_rows gives v that is not finite"),
        ("random", "merge_rows gives v that is not finite, or differs"),
        ("none", "merge_rows failed: TypeError"),
        ("writes", "merge_rows failed: ValueError: .*read-only"),
    ],
)
def test_merging_is_checked(way: str, offence: str) -> None:
    with pytest.raises(PolicyError, match=offence):
        check_policy(Merging(way=way))
    check_policy(Merging())


@pytest.mark.parametrize("name", POLICIES)
def test_our_own_pass(name: str) -> None:
    check_policy(make_policy(name))
    if name == "lookm":
        for merge in ("average", "pivotal", "weighted"):
            check_policy(LookMPolicy(merge=merge))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Settings(Policy):
    """One of every type."""

    name: ClassVar[str] = "settings"

    whole: int = 0
    share: float = 0.0
    flag: bool = False
    word: str = ""
    maybe: int | None = 5
    choice: Literal["a", "b"] = "a"
    merge: Merge = "none"
    several: tuple[int, ...] = ()

    def pick(self, observation: Observation, n_keep: int, protected: BoolArray) -> BoolArray:
        return protected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("whole=-3", -3),
        ("share=0.25", 0.25),
        ("share=1", 1.0),
        ("flag=on", True),
        ("flag=False", False),
        ("word=a=b", "a=b"),
        (" word = x ", "x"),
        ("maybe=none", None),
        ("maybe=7", 7),
        ("choice=b", "b"),
        ("merge=pivotal", "pivotal"),
    ],
)
def test_settings_as_text(text: str, value: object) -> None:
    policy = with_settings(Settings, [text], {})
    got = getattr(policy, text.split("=")[0].strip())
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["whole=1.5"], "policy setting whole is '1.5'; it must be a whole number"),
        (["share=much"], "policy setting share is 'much'; it must be a number"),
        (["flag=2"], "policy setting flag is '2'; it must be on or off"),
        (["choice=c"], "policy setting choice is 'c'; it must be a, b"),
        (["several=1"], "policy setting several is '1'; it must be of the type"),
        (["maybe=x"], "policy setting maybe is 'x'; it must be a whole number$"),
        (["whole"], "policy setting 'whole' is not of the form name=value"),
        (["whole=1", "whole=2"], "policy setting whole is given twice"),
        (["colour=red"], "policy settings does not know colour; its settings are choice"),
    ],
)
def test_settings_that_cannot_be_read(texts: list[str], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        with_settings(Settings, texts, {})


def test_a_setting_is_given_once() -> None:
    assert make_policy("h2o", ["recent=0.25"]) == H2oPolicy(recent=0.25)
    with pytest.raises(PolicyError, match="pool is given twice"):
        make_policy("csp", ["pool=3"], pool=5)
    with pytest.raises(PolicyError, match=r"recent is 2\.0; it must be between 0 and 1"):
        make_policy("h2o", ["recent=2"])


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    (tmp_path / "newest.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    policy = make_policy(f"{tmp_path / 'newest.py'}:Newest", ["per_picture=2"])
    pos = np.arange(12, dtype=np.int32)[None, None]
    tag = (pos // 4 < 2).astype(np.uint8)  # two pictures of four cells, then text
    observation = Observation(tag, pos, span=pos // 4, offset=pos % 4, spans=[Span(4)] * 9)
    cells = policy.select(observation, 7, np.zeros((1, 1, 12), np.bool_))
    assert cells.tolist() == [[[2, 3, 6, 7, 9, 10, 11]]]


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_in_the_docs(name: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    assert f"| `{name}` |" in text
