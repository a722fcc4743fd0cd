"""What a run has done, so that it goes on after a crash: one JSON file, replaced as a whole.

made     model, input, plan, options: what must be the same to go on
done     regions whose rows are on the disk
files    checksum of what was written to each file of the working folder
states   tensors that no region can be computed without (sums over all regions so far), a file for each slot
placed   at the end: files that have taken, or are about to take, their final names
sum      of all this: a journal that was cut off or changed is refused

Every name of a file is made here from a number: a journal that names other files is none.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ranger_nn.errors import InputError
from ranger_nn.io.atomic import atomic_write
from ranger_nn.io.protocol import Array
from ranger_nn.io.rows import ANEW
from ranger_nn.io.workplace import JOURNAL

VERSION = 2
UNKNOWN = "no fingerprint: "
"""What is told so is not the same as itself: nobody knows."""


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
    files: dict[str, int] = field(default_factory=dict)
    placed: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    _saved: dict[int, str] = field(default_factory=dict, repr=False)

    def resume(self, total: int | None = None) -> bool:
        """Take up what is written there, of `total` regions; False where nothing is.

        Raises:
            InputError: something else was written there, or it is damaged: it says what differs.
        """
        path = self.folder / JOURNAL
        if not path.is_file():
            return False
        found = _read(path)
        self._compare(found["made"], path)
        try:
            self._take(found, total)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{str(path)!r} is no journal of this run ({error!r}): {ANEW}") from error
        return True

    def _compare(self, before: Any, path: Path) -> None:
        now = json.loads(json.dumps(self.made))
        differing = [k for k in now if before.get(k) != now[k]]
        unknown = _unknown(now)
        if differing:
            raise InputError(
                f"the unfinished run in {str(self.folder)!r} was made with another {', '.join(differing)}, so it cannot go on"
                f"{_detail(before, now, differing)}. Use the same as then, or start anew: overwrite=True (--overwrite)."
            )
        if unknown:
            raise InputError(
                f"the unfinished run in {str(self.folder)!r} cannot go on: whether {unknown} is what it was then cannot be "
                f"told. Start anew: overwrite=True (--overwrite)."
            )

    def _take(self, found: dict[str, Any], total: int | None) -> None:
        done = found["done"]
        if type(done) is not int or done < 0 or (total is not None and done > total):
            raise ValueError(f"{done} regions of {total}")
        self.done, self.tally, self.seconds = done, dict(found["tally"]), float(found["seconds"])
        self.bad = [tuple((int(lo), int(hi)) for lo, hi in box) for box in found["bad"]]
        self.files = {str(k): int(v) for k, v in found["files"].items()}
        self.placed = {str(k): int(v) for k, v in found["placed"].items()}
        self._saved = {int(k): str(v) for k, v in found["states"].items()}

    @property
    def slots(self) -> set[int]:
        """Slots whose states are kept."""
        return set(self._saved)

    def save(self, states: dict[int, list[Array]] | None = None) -> None:
        """Replace the journal; states that it has not seen before it, those that it no longer needs after it.

        None: the states are as they were.
        """
        before = dict(self._saved)
        for slot in (states or {}).keys() - before.keys():
            self._saved[slot] = self._keep(slot, (states or {})[slot])
        if states is not None:
            self._saved = {slot: self._saved[slot] for slot in states}
        names = ("made", "done", "tally", "bad", "files", "placed", "seconds")
        plain = {k: getattr(self, k) for k in names} | {"version": VERSION, "states": self._saved}
        text = json.dumps(plain)
        with atomic_write(self.folder / JOURNAL) as file:
            file.write(json.dumps(json.loads(text) | {"sum": _sum(json.loads(text))}).encode())
        for slot in before.keys() - self._saved.keys():
            self._state(slot).unlink(missing_ok=True)

    def _keep(self, slot: int, state: list[Array]) -> str:
        held = io.BytesIO()
        np.savez(held, *state)
        with atomic_write(self._state(slot)) as file:
            file.write(held.getbuffer())
        return hashlib.sha256(held.getbuffer()).hexdigest()

    def states(self) -> dict[int, list[Array]]:
        """The states of the last save, by slot.

        Raises:
            InputError: one is missing or changed.
        """
        found: dict[int, list[Array]] = {}
        for slot, digest in self._saved.items():
            path = self._state(slot)
            try:
                held = path.read_bytes()
                if hashlib.sha256(held).hexdigest() != digest:
                    raise ValueError("it does not hold what was written there")
                with np.load(io.BytesIO(held), allow_pickle=False) as kept:
                    found[slot] = [kept[f"arr_{i}"] for i in range(len(kept.files))]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(f"{str(path)!r} cannot be used ({error}): {ANEW}") from error
        return found

    def _state(self, slot: int) -> Path:
        return self.folder / f"state-{slot:d}.npz"


def _read(path: Path) -> dict[str, Any]:
    """The journal, whole and as it was written.

    Raises:
        InputError: it is not.
    """
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict) or not isinstance(found["made"], dict):
            raise ValueError("no journal")
        version, told = found["version"], found.pop("sum", None)
    except (ValueError, KeyError, OSError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}): {ANEW}") from error
    if version != VERSION:
        raise InputError(
            f"the unfinished run in {str(path.parent)!r} was made with another version of Ranger's journal ({version}, now "
            f"{VERSION}): {ANEW}"
        )
    if told != _sum(found):
        raise InputError(f"{str(path)!r} cannot be read (it does not hold what was written there): {ANEW}")
    return found


def _sum(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _unknown(value: Any, name: str = "") -> str:
    """The first thing that has no fingerprint; empty: all have one."""
    if isinstance(value, dict):
        return next((found for k, v in value.items() if (found := _unknown(v, str(k)))), "")
    return f"{name} ({value.removeprefix(UNKNOWN)})" if isinstance(value, str) and value.startswith(UNKNOWN) else ""


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
