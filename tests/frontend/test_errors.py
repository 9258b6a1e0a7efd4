"""Error messages are one printable line, whatever goes into them."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_csp import errors
from edge_csp.errors import EdgeCspError, NativeError


@pytest.mark.parametrize("name", errors.__all__)
def test_all_errors_have_one_base(name: str) -> None:
    assert issubclass(getattr(errors, name), EdgeCspError)


@given(st.text())
def test_one_printable_line(text: str) -> None:
    assert str(EdgeCspError(text)).isprintable()


def test_messages_stay_readable() -> None:
    assert str(EdgeCspError("a.png: cut\n   off, 3 × 4")) == "a.png: cut off, 3 × 4"
    assert str(EdgeCspError("\x1b[2J\udc80")) == r"\x1b[2J\udc80"


def test_native_status_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NativeError("refused", -2)))
    assert (str(error), error.status) == ("refused", -2)
