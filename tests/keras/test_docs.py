"""The Keras examples of the documentation run on this back end."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest

from tests.pages import PAGES, blocks, run


@pytest.mark.parametrize("page", ["README.md", *(p for p in PAGES if blocks(p, keras=True))])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    assert run(page, keras=True)
