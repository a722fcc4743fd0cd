"""The plan of every network of the zoo, as text, in one file each beside this one.

A change of the planner shows as a change of text that a reviewer can read. After looking at it,
write the new texts with `RANGER_UPDATE_GOLDEN=1 pytest tests/golden`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ranger_nn
from ranger_nn import errors
from ranger_nn.torch.one_call import Call
from tests.support import Entry
from tests.zoo import ZOO

FOLDER = Path(__file__).parent
UPDATE = os.environ.get("RANGER_UPDATE_GOLDEN", "") not in ("", "0")
SHARE = 0.5  # of what the fastest plan needs


def larger(entry: Entry) -> tuple[int, ...]:
    """The test size times four in the plane, times two in a volume: where a budget binds."""
    batch, channels, *sizes = entry.shapes[0]
    factor = 2 if len(sizes) == 3 else 4
    return (batch, channels, *(factor * n for n in sizes))


def planned(entry: Entry) -> str:
    """The text of the plan at half the memory of the fastest one, or at the least that fits."""
    model, x = entry.make(torch.float32), torch.empty(larger(entry), device="meta")
    fastest = ranger_nn.plan(model, x)
    memory = max(1, int(SHARE * fastest.projected))
    try:
        plan = ranger_nn.plan(model, x, memory=memory)
    except errors.BudgetError as error:
        plan = ranger_nn.plan(model, x, memory=error.least)
    return f"{entry.name} on {'x'.join(map(str, x.shape))}\n{plan}\n"


@pytest.fixture(autouse=True)
def _any_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workspace grows with the threads of a machine, and what a single call takes depends on its instructions: the texts are of
    one thread, and of what is said for all machines.
    """
    monkeypatch.setattr(Call, "counted", lambda self, gives: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SEARCHED_LONG = ("densenet121", "unet2d", "segformer", "vnet", "vnet_3d", "swin_tiny", "efficientnet_b0", "resnet50")
"""Networks for which searches inside budgets take tens of seconds: with the slow tests."""


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, id=e.name, marks=[pytest.mark.slow] if e.name in SEARCHED_LONG else []) for e in ZOO],
)
def test_plan(entry: Entry) -> None:
    """The text of the plan is what it was."""
    if entry.needs is not None:
        pytest.importorskip(entry.needs)
    text, golden = planned(entry), FOLDER / f"{entry.name}.txt"
    if UPDATE:
        golden.write_text(text, encoding="utf-8")
    assert golden.exists(), f"no {golden.name}: run with RANGER_UPDATE_GOLDEN=1 and read what it writes"
    assert text == golden.read_text(encoding="utf-8")


def test_every_file_has_its_network() -> None:
    """No text is left behind when a network leaves the zoo."""
    assert {f.stem for f in FOLDER.glob("*.txt")} <= {entry.name for entry in ZOO}
