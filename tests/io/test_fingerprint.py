"""Callables that do something else have another fingerprint, whatever they are called."""

from __future__ import annotations

import functools
import os
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
