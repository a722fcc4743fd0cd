"""The pages of documentation and what is in them: code blocks and links."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))


def blocks(page: str, keras: bool) -> list[str]:
    """Python blocks of a page: those that import Keras, or all others; with the lines that stand before them, blank."""
    text = (ROOT / page).read_text()
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if ("keras" in match[1]) == keras:
            found.append("\n" * text[: match.start(1)].count("\n") + match[1])
    return found


def run(page: str, keras: bool) -> int:
    """Run a page's blocks in one fresh namespace, in order; how many there are."""
    names: dict[str, Any] = {"__name__": page}
    found = blocks(page, keras)
    for block in found:
        exec(compile(block, page, "exec"), names)  # our own text
    return len(found)


def links(page: str) -> list[str]:
    """Files that a page names in links and pictures, relative to it."""
    found = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / page).read_text())
    return [link for link in found if "://" not in link]


def example(name: str) -> Any:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
