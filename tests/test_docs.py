"""The documentation holds: its PyTorch examples run, its links lead somewhere, its pictures are small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pages import PAGES, ROOT, links, run

PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.png"))


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    count = run(page, keras=False)
    assert count or "/" not in page.removeprefix("docs/")


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_to_files(page: str) -> None:
    missing = [link for link in links(page) if not ((ROOT / page).parent / link).exists()]
    assert not missing


def test_every_page_and_picture_is_reached_from_the_index() -> None:
    reached = {(ROOT / "docs" / "README.md").resolve()}
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page.is_relative_to(ROOT / "docs"):
            found = {(page.parent / link).resolve() for link in links(str(page.relative_to(ROOT)))} - reached
            reached |= found
            waiting += found
    assert {ROOT / page for page in PAGES} <= reached
    assert set(PICTURES) <= reached


def test_pictures_are_small() -> None:
    assert PICTURES
    assert {p.name: p.stat().st_size for p in PICTURES if p.stat().st_size > 60_000} == {}
