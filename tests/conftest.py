"""What holds for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch as th


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """A test leaves torch's threads to the next one as it found them: a forked process hangs in a team of more than one."""
    before = th.get_num_threads()
    yield
    th.set_num_threads(before)


@pytest.fixture
def one_thread() -> None:
    """Torch computes on one thread: sums in the same order, whatever the machine has."""
    th.set_num_threads(1)
