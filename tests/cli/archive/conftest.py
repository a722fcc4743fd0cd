"""Good archives, made once, and a marker that no archive may make."""

from __future__ import annotations

import pytest
import torch

from tests.cli.archive.models import good


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """Name to (path, module, arguments, keywords)."""
    folder = tmp_path_factory.mktemp("archives")
    made = {}
    for name, (model, args, kwargs, shapes) in good().items():
        path = folder / f"{name}.pt2"
        exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(exported, path, extra_files={"notes.txt": 'it\'s "text"'})
        made[name] = (path, exported.module(), args, kwargs)
    return made


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "PWNED"
