"""Fixtures of the frontend tests. They need no network and no GPU, and make their input files themselves."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from edge_csp.errors import EdgeCspError

Refuses = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def refuses() -> Refuses:
    """Check that a block raises exactly this error, in one line that has all of the words."""

    @contextmanager
    def check(error: type[EdgeCspError], *words: object) -> Iterator[None]:
        with pytest.raises(EdgeCspError) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is error
        assert message
        assert message.isprintable()
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(str(word))}(?!\w)", message), f"{word!r} is not in {message!r}"

    return check


@pytest.fixture
def shared() -> Path:
    """Folder with a small real model beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).parents[3] / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not there")
    return folder
