"""The Keras examples of the documentation run on this back end."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest

from tests.pages import PAGES, blocks, run


def pages() -> list[object]:
    """README and the pages with examples for Keras; those of layers are compiled for a minute on JAX: marked slow there."""
    found = ["README.md", *(p for p in PAGES if blocks(p, keras=True))]
    jax = keras.backend.backend() == "jax"
    return [pytest.param(p, marks=[pytest.mark.slow] if jax and "layers" in p else []) for p in found]


@pytest.mark.parametrize("page", pages())
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    assert run(page, keras=True)
