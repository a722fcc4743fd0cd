"""What forward reads beside its modules: the environment, iterators, a module's dictionaries."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn.errors import CaptureError
from ranger_nn.torch.environment import unchanged, watched
from ranger_nn.torch.identity import position

COUNTER: Iterator[int] = itertools.count(1)


def regional(model: nn.Module) -> nn.Module:
    """By regions of eight rows and columns."""
    return ranger_nn.regionalize(model, regions=(8, 8))


def factors(small: nn.Module, calls: int) -> list[float]:
    """By what calls multiply ones."""
    return [float(small(torch.ones(1, 1, 16, 16)).mean()) for _ in range(calls)]


class Scaled(nn.Module):
    """Reads an environment variable in forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Times SCALE, or as it is."""
        return x * float(os.environ.get("SCALE", "1"))


def test_an_environment_variable_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set, changed, changed back, deleted: what the untouched module gives."""
    monkeypatch.delenv("SCALE", raising=False)
    small, found = regional(Scaled()), []
    for value in (None, "2", "2", "3", "2", None):
        monkeypatch.delenv("SCALE", raising=False) if value is None else monkeypatch.setenv("SCALE", value)
        found += factors(small, 1)
    assert found == [1, 2, 2, 3, 2, 1]


def test_only_what_this_thread_reads_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is not there; what another thread reads meanwhile is not."""
    monkeypatch.setenv("HERE", "1")
    monkeypatch.delenv("NOT_THERE", raising=False)
    monkeypatch.setenv("ELSEWHERE", "1")
    with watched() as found:
        assert os.environ["HERE"] == "1"
        assert os.getenv("NOT_THERE") is None
        other = threading.Thread(target=lambda: os.environ["ELSEWHERE"])
        other.start()
        other.join()
    assert found == {"HERE": "1", "NOT_THERE": None}
    assert unchanged(found)
    monkeypatch.setenv("NOT_THERE", "1")
    assert not unchanged(found)


def counted() -> Iterator[int]:
    """1, 2, 3 ..."""
    k = 0
    while True:
        k += 1
        yield k


ITERATORS: dict[str, Callable[[], Any]] = {
    "count": lambda: itertools.count(1),
    "list": lambda: iter([1, 2, 3, 4, 5]),
    "range": lambda: iter(range(1, 9)),
    "generator": counted,
    "expression": lambda: (k for k in (1, 2, 3, 4)),
    "cycle": lambda: itertools.cycle([1, 2, 3]),
    "map": lambda: map(abs, [1, 2, 3, 4]),
    "zip": lambda: map(max, zip([1, 2, 3, 4], counted())),
    "in a list": lambda: [counted()],
}


class Next(nn.Module):
    """Takes the next of an iterator that it holds."""

    def __init__(self, held: Any) -> None:
        """`held`: an iterator, or a list of one."""
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        """Times the next number."""
        number: int = next(self.held[0] if isinstance(self.held, list) else self.held)
        return x * number


@pytest.mark.parametrize("kind", ITERATORS)
def test_a_module_that_takes_the_next_is_refused(kind: str) -> None:
    """Each call gives something else, and no plan can follow it."""
    with pytest.raises(CaptureError, match="reads it in the next call"):
        factors(regional(Next(ITERATORS[kind]())), 1)


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_that_moves_is_seen(kind: str) -> None:
    """Whoever moves it; where none does it is the same."""
    held = ITERATORS[kind]()
    one = held[0] if isinstance(held, list) else held
    for _ in range(2):
        before = position(one)
        assert position(one) == before
        next(one)
        assert position(one) != before


class Global(nn.Module):
    """Takes the next of a global iterator."""

    def forward(self, x: Tensor) -> Tensor:
        """Times the next number."""
        return x * next(COUNTER)


def test_a_global_iterator_moves_on() -> None:
    """As a global counter does."""
    assert factors(regional(Global()), 3) == [1, 2, 3]


class Direct(nn.Module):
    """Puts a tensor into a dictionary of its own."""

    def __init__(self, directly: bool) -> None:
        """`directly`: not by the attribute."""
        super().__init__()
        self.directly = directly
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Times the number of calls."""
        if self.directly:
            self._buffers["seen"] = self.seen + 1
        else:
            self.seen = self.seen + 1
        return x * self.seen


def test_a_buffer_that_is_put_into_the_dictionary_is_refused() -> None:
    """An assignment to the attribute is followed; this one nothing shows."""
    with torch.no_grad():
        assert factors(regional(Direct(False)), 3) == [1, 2, 3]
        with pytest.raises(CaptureError, match=r"self\.seen = value"):
            factors(regional(Direct(True)), 1)
