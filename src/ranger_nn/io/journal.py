"""What a run has done, so that it goes on after a crash: one JSON file, replaced as a whole.

made     model, input, plan, options: what must be the same to go on
done     regions whose rows are on the disk
states   tensors that no region can be computed without (sums over all regions so far), a file for each slot
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.atomic import atomic_write
from ranger_nn.io.protocol import Array

NAME = "journal.json"
VERSION = 1


@dataclass
class Journal:
    """The state of a run in its working folder.

    Args:
        folder: the working folder.
        made: name of a part (model, input, plan, options) -> plain data that identifies it.
    """

    folder: Path
    made: dict[str, Any]
    done: int = 0
    tally: dict[str, Any] = field(default_factory=dict)
    bad: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    _saved: set[int] = field(default_factory=set, repr=False)

    def resume(self) -> bool:
        """Take up what is written there; False where nothing is.

        Raises:
            InputError: something else was written there: it says what differs.
        """
        path = self.folder / NAME
        if not path.is_file():
            return False
        try:
            found = json.loads(path.read_text())
            differing = [k for k in self.made if found["made"].get(k) != json.loads(json.dumps(self.made[k]))]
            version = found["version"]
        except (ValueError, KeyError, OSError) as error:
            raise InputError(
                f"{str(path)!r} cannot be read ({error}). Start anew: overwrite=True (--overwrite)."
            ) from error
        if version != VERSION or differing:
            what = ", ".join(differing) or "the version of Ranger's journal"
            raise InputError(
                f"the unfinished run in {str(self.folder)!r} was made with another {what}, so it cannot go on"
                f"{_detail(found['made'], self.made, differing)}. Use the same as then, or start anew: overwrite=True "
                "(--overwrite)."
            )
        self.done, self.tally, self.bad = found["done"], found["tally"], found["bad"]
        self.seconds, self._saved = found["seconds"], set(found["states"])
        return True

    def save(self, states: dict[int, list[Array]]) -> None:
        """Replace the journal; states that it has not seen before it, those that it no longer needs after it."""
        for slot in states.keys() - self._saved:
            with atomic_write(self._state(slot)) as file:
                np.savez(file, *states[slot])
        plain = {k: getattr(self, k) for k in ("made", "done", "tally", "bad", "seconds")}
        with atomic_write(self.folder / NAME) as file:
            file.write(json.dumps(plain | {"version": VERSION, "states": sorted(states)}).encode())
        for slot in self._saved - states.keys():
            self._state(slot).unlink(missing_ok=True)
        self._saved = set(states)

    def states(self) -> dict[int, list[Array]]:
        """The states of the last save, by slot."""
        found: dict[int, list[Array]] = {}
        for slot in self._saved:
            with np.load(self._state(slot), allow_pickle=False) as kept:
                found[slot] = [kept[f"arr_{i}"] for i in range(len(kept.files))]
        return found

    def _state(self, slot: int) -> Path:
        return self.folder / f"state-{slot}.npz"


def _detail(before: dict[str, Any], now: dict[str, Any], differing: list[str]) -> str:
    """The first thing that differs, as far as it is short."""
    for part in differing:
        a, b = before.get(part), now.get(part)
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}):
                if a.get(key) != b.get(key):
                    return f" ({part}: {key} was {_short(a.get(key))}, is {_short(b.get(key))})"
        return f" ({part} was {_short(a)}, is {_short(b)})"
    return ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
