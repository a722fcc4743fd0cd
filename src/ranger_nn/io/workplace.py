"""The working folder of a run, `.NAME.partial` beside the result: one run at a time, and nothing in it that is not ours.

    lock              locked by the run that works here (the system lets go of it when the process ends, however it ends),
                      and says who that is
    rows-0.npy ...    what is not finished, see `OURS`

A folder that holds anything else is never touched. A run that finds its lock gone (somebody removed the folder) stops with
an error and renames nothing. Enter at `Workplace`.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import secrets
import shutil
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from ranger_nn.errors import InputError, WriteError

try:
    import fcntl
except ImportError:  # not on Windows: there a second run is only noticed when it takes the place
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"
JOURNAL = "journal.json"
MARK = "ranger_nn run"
OURS = re.compile(
    r"lock|journal\.json|absent|stored-\d+|state-\d+\.npz|value-\d+\.npy|replaced-\d+"
    r"|rows-\d+(\.npy|-result\.\w+)|\..+\.[0-9a-f]{8}\.partial"
)
"""What a run makes in its folder; the last are files of `atomic_write` that a kill left."""
TRIES = 20
"""A folder may vanish between being found and being locked, where another run has just ended; not again and again."""


def working_folder(path: Path) -> Path:
    """The folder of a run that is not finished."""
    return path.with_name(f".{path.name}.partial")


class Workplace:
    """The working folder of `path`, made and locked.

    Raises:
        InputError: another run holds it (it says which), or what has its name is not ours.
        WriteError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, working_folder(path)
        self._token = secrets.token_hex(8)
        try:
            self._file = self._take()
        except OSError as error:
            raise WriteError(f"cannot make {str(self.folder)!r}: {error.strerror}.") from error

    def _take(self) -> int:
        for _ in range(TRIES):
            self._make()
            try:
                file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except FileNotFoundError:
                continue
            if self._locked(file):
                return file
            os.close(file)
        raise InputError(f"{str(self.folder)!r} comes and goes: other runs write {str(self.path)!r}. Let them end.")

    def _make(self) -> None:
        try:
            self.folder.mkdir()
        except FileExistsError:
            reason = not_ours(self.folder)
            if reason:
                raise InputError(
                    f"the run would work in {str(self.folder)!r}, and {reason}. Move that away, or give the result "
                    "another name."
                ) from None

    def _locked(self, file: int) -> bool:
        """Whether the file is locked now and is still the one in the folder; then it says who holds it."""
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(os.pread(file, 4096, 0))
            os.close(file)
            raise InputError(
                f"another run is writing {str(self.path)!r}: {holder}. Wait until it has ended, or stop it."
            ) from None
        except OSError:
            pass  # a file system without locks: `check` still notices that the place was taken
        try:
            if not os.path.samestat(os.fstat(file), os.lstat(self.folder / LOCK)):
                return False
        except FileNotFoundError:
            return False
        who = {
            "made by": MARK,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": self._token,
        }
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(who).encode(), 0)
        return True

    def check(self) -> None:
        """Hold on to the place.

        Raises:
            WriteError: the folder is no longer this run's.
        """
        try:
            with open(self.folder / LOCK, "rb") as file:
                same = os.path.samestat(os.fstat(self._file), os.fstat(file.fileno()))
                said = file.read(4096)
        except OSError:
            same, said = False, b""
        if not same or self._token.encode() not in said:
            now = f": {_holder(said)} works there now" if said else " has been removed"
            raise WriteError(
                f"{str(self.folder)!r}, in which this run kept its rows,{now}. This run stops and leaves everything as it "
                "is: its result is not whole. Run again."
            )

    def clear(self) -> None:
        """Remove what earlier runs left."""
        for entry in os.listdir(self.folder):
            if entry != LOCK:
                remove(self.folder / entry)

    def remove(self) -> None:
        """The run has ended: nothing of it stays."""
        self.check()
        self.clear()
        with suppress(OSError):
            (self.folder / LOCK).unlink()
            self.folder.rmdir()

    def close(self) -> None:
        """Let go of the lock; what is in the folder stays."""
        if self._file >= 0:
            with suppress(OSError):
                if fcntl is not None:  # for processes that were forked meanwhile too
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            os.close(self._file)
            self._file = -1


def not_ours(folder: Path) -> str:
    """Why a folder is none that a run made, in words; empty where it is one, or holds nothing."""
    if folder.is_symlink():
        return f"that is a symbolic link to {os.readlink(folder)!r}"
    if not folder.is_dir():
        return "that is no folder"
    with suppress(FileNotFoundError):
        entries = sorted(os.listdir(folder))
        strange = [e for e in entries if not OURS.fullmatch(e) or _is_other(folder / e)]
        if strange:
            return f"that holds {', '.join(map(repr, strange[:3]))}, which no run of Ranger made"
        if entries not in ([], [LOCK]) and not (_marked(folder / LOCK) or _is_journal(folder / JOURNAL)):
            return f"that holds {', '.join(map(repr, entries[:3]))} without the lock or the journal of a run of Ranger"
    return ""


def _is_other(entry: Path) -> bool:
    """Neither the file nor the folder (of a Zarr result) that its name stands for."""
    folder = entry.suffix == ".zarr" or (entry.name.startswith("replaced-") and entry.is_dir())
    return not (stat.S_ISDIR if folder else stat.S_ISREG)(entry.lstat().st_mode)


def _marked(lock: Path) -> bool:
    try:
        return _said(lock.read_bytes()).get("made by") == MARK
    except OSError:
        return False


def _is_journal(path: Path) -> bool:
    try:
        return {"made", "done", "version"} <= _said(path.read_bytes()).keys()
    except OSError:
        return False


def _said(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(text: bytes) -> str:
    said = _said(text)
    if not said:
        return "a process that has just begun"
    return f"process {said.get('process')} on {said.get('host')}, since {said.get('since')}"


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
