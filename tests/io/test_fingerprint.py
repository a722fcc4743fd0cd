"""Callables that do something else have another fingerprint, whatever they are called."""

from __future__ import annotations

import enum
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from ranger_nn.io.fingerprint import NoFingerprintError, fingerprint

FACTOR = 3


def by_global(y):
    return y * FACTOR


def by_closure(k):
    return lambda y: y * k


def by_default(k):
    def scaled(y, by=k):
        return y * by

    return scaled


class Scaled:
    def __init__(self, k):
        self.k = k

    def __call__(self, y):
        return self.helped(y) * self.k

    def helped(self, y):
        return y + 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda y: y * 2, lambda y: y * 3),
        (lambda y: y * 0.0, lambda y: y * -0.0),
        (lambda y: y * 1, lambda y: y * True),
        (lambda y: y.max(0), lambda y: y.min(0)),
        (lambda y: [z * 2 for z in y], lambda y: [z * 3 for z in y]),
        (by_closure(2), by_closure(3)),
        (by_closure(np.arange(3)), by_closure(np.arange(3) * 2)),
        (by_default(2), by_default(3)),
        (Scaled(2), Scaled(3)),
        (Scaled(2).helped, Scaled(2).__call__),
        (functools.partial(by_closure(2), k=1), functools.partial(by_closure(2), k=2)),
        (np.add, np.subtract),
        (torch.sigmoid, torch.tanh),
        (np.random.default_rng(1), np.random.default_rng(2)),
    ],
)
def test_told_apart(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one)


def test_the_same_made_again():
    assert fingerprint(by_closure(2)) == fingerprint(by_closure(2))
    assert fingerprint(Scaled(2)) == fingerprint(Scaled(2))
    assert fingerprint({2, 1, 3}) == fingerprint({3, 2, 1})


def test_what_it_uses_counts(monkeypatch):
    first, method = fingerprint(by_global), fingerprint(Scaled(1))
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 4)
    assert fingerprint(by_global) != first
    monkeypatch.setattr(Scaled, "helped", lambda self, y: y + 2)
    assert fingerprint(Scaled(1)) != method


def test_cycles_end():
    held = []
    held.append(held)
    assert fingerprint(held) == fingerprint(held)


@pytest.mark.parametrize("value", [threading.Lock(), (n for n in ())], ids=["lock", "generator"])
def test_what_cannot_be_told(value):
    with pytest.raises(NoFingerprintError):
        fingerprint(lambda y: value)


def test_the_same_in_another_process():
    """Sets of text are in another order there."""
    code = (
        "from ranger_nn.io.fingerprint import fingerprint; "
        "print(fingerprint((lambda y: y in {'a', 'b', 'c', 'd'}, {'x', 'y', 'z'})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


MINE = """
import sub_of_mine
from dataclasses import dataclass
import functools, enum
k, table = 2, {"k": [2]}
def scale(y): return y * k
def other(y): return y
def by_attribute(y): return y * by_attribute.k
by_attribute.k = 2
class Meta(type):
    @property
    def k(cls): return cls.held["k"]
class Config(metaclass=Meta):
    held = {"k": 2}
@dataclass
class Data:
    k: int = 2
class Lies:
    def __init__(self): self.k = 2
    def __reduce__(self): return (Lies, ())
    def __call__(self, y): return y * self.k
class Number(float):
    k = 2
number = Number(1)
class Held(list): pass
held = Held([1])
class Kind(enum.Enum):
    A = 2
class Whole:
    @functools.cached_property
    def k(self): return 2
    mod = sub_of_mine
    def __call__(self, y): return self.mod.k * y
whole = Whole()
lies = Lies()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own, and one that it imports."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "sub_of_mine.py").write_text("k = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield importlib.import_module("mine")
    for name in ("mine", "sub_of_mine"):
        sys.modules.pop(name, None)


def uses(mine):
    """Callables that use the module, each in its way."""

    def by_import(y):
        import sub_of_mine

        return y * sub_of_mine.k

    def from_import(y):
        from sub_of_mine import k

        return y * k

    return {
        "function": lambda y: mine.scale(y),
        "value": lambda y: y * mine.k,
        "table": lambda y: y * mine.table["k"][0],
        "attribute of a function": lambda y: mine.by_attribute(y),
        "metaclass": lambda y: y * mine.Config.k,
        "data class": lambda y: y * mine.Data().k,
        "own pickling": mine.lies,
        "derived from a number": lambda y: y * mine.number.k,
        "attribute of a list": lambda y: y * mine.held.k,
        "module inside": lambda y: y * mine.sub_of_mine.k,
        "module of a class": mine.whole,
        "imported inside": by_import,
        "taken inside": from_import,
    }


def change(mine, name):
    mine.held.k = 3
    {
        "function": lambda: setattr(mine, "k", 3),
        "value": lambda: setattr(mine, "k", 3),
        "table": lambda: mine.table["k"].append(3),
        "attribute of a function": lambda: setattr(mine.by_attribute, "k", 3),
        "metaclass": lambda: mine.Config.held.update(k=3),
        "data class": lambda: setattr(mine.Data, "k", 3),
        "own pickling": lambda: setattr(mine.lies, "k", 3),
        "derived from a number": lambda: setattr(mine.number, "k", 3),
        "attribute of a list": lambda: None,
    }.get(name, lambda: setattr(sys.modules["sub_of_mine"], "k", 3))()


USES = ("function", "value", "table", "attribute of a function", "metaclass", "data class", "own pickling",
        "derived from a number", "attribute of a list", "module inside", "module of a class", "imported inside",
        "taken inside")  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_what_a_module_of_the_user_holds_counts(mine, name):
    used = uses(mine)[name]
    first = fingerprint(used)
    assert fingerprint(used) == first
    change(mine, name)
    assert fingerprint(used) != first


def test_the_source_of_a_module_counts(mine, tmp_path):
    """What is looked up by text no one sees in the code."""
    used = uses(mine)["value"]
    first = fingerprint(used)
    (tmp_path / "mine.py").write_text(MINE.replace("k, table = 2", "k, table = 3"))
    assert fingerprint(used) != first


class Descriptor:
    def __init__(self, k):
        self.k = k

    def __get__(self, instance, owner=None):
        return self.k


class Kind(enum.Enum):
    A = 2


class Members:
    array = np.ones(2)
    table = {"k": 2}  # noqa: RUF012
    partial = functools.partial(np.multiply, 2)
    descriptor = Descriptor(2)
    kind = Kind.A

    def __call__(self, y):
        return y


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("array", np.full(2, 3.0)),
        ("table", {"k": 3}),
        ("partial", functools.partial(np.multiply, 3)),
        ("descriptor", Descriptor(3)),
        ("kind", 2),
    ],
)
def test_members_of_a_class_count(monkeypatch, name, value):
    first = fingerprint(Members())
    assert fingerprint(Members()) == first
    monkeypatch.setattr(Members, name, value)
    assert fingerprint(Members()) != first


def test_a_member_of_a_class_that_cannot_be_told(monkeypatch):
    monkeypatch.setattr(Members, "lock", threading.Lock(), raising=False)
    with pytest.raises(NoFingerprintError):
        fingerprint(Members())


def test_masks_count():
    one, other = (np.ma.masked_array(np.arange(3), mask) for mask in ([0, 0, 1], [0, 1, 0]))
    assert fingerprint(one) != fingerprint(other)


environment, load = os.environ, np.load


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y * float(open("k.txt").read()),  # noqa: SIM115
        lambda y: y * float(os.environ["K"]),
        lambda y: y * float(os.getenv("K", "1")),
        lambda y: y * float(environment["K"]),
        lambda y: y * load("k.npy"),
        lambda y: y * np.load("k.npy"),
        lambda y: y * float(pathlib.Path("k.txt").read_text()),
        lambda y: eval("y * FACTOR"),
        lambda y: y * importlib.import_module("elsewhere").k,
        lambda y: (lambda: float(open("k.txt").read()))() * y,  # noqa: SIM115
    ],
)
def test_what_lies_outside_is_not_told(function):
    with pytest.raises(NoFingerprintError, match="whose contents may be others"):
        fingerprint(function)
