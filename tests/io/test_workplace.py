"""One run at a time in a working folder, which is ours or is left alone; names that take nothing away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from ranger_nn.errors import InputError, WriteError
from ranger_nn.io.naming import MARK, check_free, checked_path, labels, place
from ranger_nn.io.sinks import FileSink, check_sink
from ranger_nn.io.workplace import Workplace, working_folder


def test_one_at_a_time(tmp_path):
    first = Workplace(tmp_path / "out.npy")
    with pytest.raises(InputError, match=rf"another run is writing .*out.npy': process {os.getpid()} on .*, since 20"):
        Workplace(tmp_path / "out.npy")
    first.close()
    second = Workplace(tmp_path / "out.npy")
    second.remove()
    second.close()
    assert os.listdir(tmp_path) == []


def test_one_of_many_threads(tmp_path):
    held, refused, gate = [], [], threading.Barrier(8)

    def take():
        gate.wait()
        try:
            held.append(Workplace(tmp_path / "out.npy"))
        except InputError:
            refused.append(1)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].close()


def test_a_killed_process_holds_nothing(tmp_path):
    code = "import sys; from ranger_nn.io.workplace import Workplace; from pathlib import Path\nw = Workplace(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    path = tmp_path / "out.npy"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        with pytest.raises(InputError, match=f"process {process.pid} on"):
            Workplace(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    Workplace(path).close()


@pytest.mark.parametrize("how", ["removed", "taken"])
def test_a_lost_place_is_noticed(tmp_path, how):
    place = Workplace(tmp_path / "out.npy")
    place.check()
    place.folder.rename(tmp_path / "moved")
    other = Workplace(tmp_path / "out.npy") if how == "taken" else None
    (place.folder / "lock").touch() if other else None
    with pytest.raises(
        WriteError, match="has been removed" if how == "removed" else r"process \d+ on .* works there now"
    ):
        place.check()
    with pytest.raises(WriteError):
        place.remove()
    assert place.folder.exists() == (how == "taken")
    place.close()


@pytest.mark.parametrize("what", ["notes.txt", "mine/", "rows-0.npy", "journal.json", "stored-x"])
def test_folders_that_are_not_ours_stay(tmp_path, what):
    folder = working_folder(tmp_path / "out.npy")
    folder.mkdir()
    (folder / what).mkdir() if what.endswith("/") else (folder / what).write_text("{}")
    with pytest.raises(InputError, match=r"out.npy.partial', and that holds .*Move that away"):
        Workplace(tmp_path / "out.npy")
    assert os.listdir(folder) == [what.rstrip("/")]


def test_links_and_files_are_no_folders(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    working_folder(tmp_path / "a.npy").symlink_to("elsewhere")
    working_folder(tmp_path / "b.npy").touch()
    with pytest.raises(InputError, match="a symbolic link to 'elsewhere'"):
        Workplace(tmp_path / "a.npy")
    with pytest.raises(InputError, match="that is no folder"):
        Workplace(tmp_path / "b.npy")
    ours = Workplace(tmp_path / "c.npy")
    ours.close()
    (ours.folder / "rows-0.npy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"that holds 'rows-0.npy'"):
        Workplace(tmp_path / "c.npy")


# ------------------------------------------------------------------------------- names


def test_only_results_of_ours_are_replaced(tmp_path):
    zarr = pytest.importorskip("zarr")
    (tmp_path / "a.npy" / "thesis").mkdir(parents=True)
    with pytest.raises(InputError, match="a folder that holds 'thesis'"):
        check_sink(tmp_path / "a.npy", True)
    zarr.open_group(tmp_path / "g.zarr", mode="w").create_array("labels", shape=(4,), dtype="u1")
    with pytest.raises(InputError, match=r"a Zarr group that no run wrote; it holds 'labels'"):
        check_sink(tmp_path / "g.zarr", True)
    zarr.create_array(store=str(tmp_path / "b.zarr"), shape=(4,), dtype="u1")
    with pytest.raises(InputError, match="a Zarr array that no run wrote"):
        check_sink(tmp_path / "b.zarr", True)
    (tmp_path / "plain.npy").touch()
    for name in ("plain.npy", "missing.npy"):
        (tmp_path / "l.npy").symlink_to(name)
        with pytest.raises(InputError, match=rf"a symbolic link to '{name}'"):
            check_sink(tmp_path / "l.npy", True)
        (tmp_path / "l.npy").unlink()
    os.mkfifo(tmp_path / "f.npy")
    with pytest.raises(InputError, match="no plain file"):
        check_sink(tmp_path / "f.npy", True)


def test_a_zarr_result_is_replaced_until_something_is_put_into_it(tmp_path):
    pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    for value in (1, 2):
        folder = working_folder(path)
        folder.mkdir()
        check_sink(path, value == 2)
        sink = FileSink(path, (1, 4, 4), np.uint8, None, False, folder / "rows-0.npy")
        sink.write(((0, 4), (0, 4)), np.full((1, 4, 4), value, np.uint8))
        sink.finish(overwrite=True)
        sink.close()
        import shutil

        shutil.rmtree(folder)
    import zarr

    assert zarr.open(str(path))[0, 0, 0] == 2
    (path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"it holds 'notes.txt', which no run wrote"):
        check_free(path, True)


@pytest.mark.parametrize(
    "what", ["c/mine/thesis.txt", "c/0/0/thesis.txt", "c/0/0/7", "c/00/x", "c/0/0/0/x", "c/0/x", "c/1/", "c/0/0/0~"]
)
def test_what_lies_deep_in_a_result_stays(tmp_path, what):
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    kept = {"shape": (1, 4, 6), "chunks": (1, 4, 4), "dtype": "u1", "attributes": {MARK: True}}
    zarr.create_array(store=str(path), **kept)[:] = 1
    check_free(path, True)
    there = path / what
    if what == "c/0/0/0/x":  # a folder in the place of a chunk
        there.parent.unlink()
    there.parent.mkdir(parents=True, exist_ok=True)
    there.mkdir() if what.endswith("/") else there.write_text("precious")
    with pytest.raises(InputError, match=r"it holds 'c/.*', which no run wrote"):
        check_free(path, True)
    assert there.exists()


def test_chunks_that_are_links_stay(tmp_path):
    zarr = pytest.importorskip("zarr")
    path = tmp_path / "out.zarr"
    zarr.create_array(store=str(path), shape=(4, 4), chunks=(4, 4), dtype="u1", attributes={MARK: True})[:] = 1
    (path / "c/0/0").rename(tmp_path / "elsewhere")
    (path / "c/0/0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="it holds 'c/0/0'"):
        check_free(path, True)


def test_folders_under_names_of_files_stay(tmp_path):
    ours = Workplace(tmp_path / "out.npy")
    ours.close()
    (ours.folder / "stored-1").mkdir()
    (ours.folder / "stored-1" / "thesis").touch()
    with pytest.raises(InputError, match="that holds 'stored-1'"):
        Workplace(tmp_path / "out.npy")


def test_what_came_meanwhile_stays(tmp_path):
    (tmp_path / "made").write_text("new")
    (tmp_path / "out.npy").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        place(tmp_path / "made", tmp_path / "out.npy", False)
    assert (tmp_path / "out.npy").read_text() == "precious"
    place(tmp_path / "made", tmp_path / "out.npy", True)
    assert (tmp_path / "out.npy").read_text() == "new"


def test_names(tmp_path):
    for name, text in (
        ("", "no name"),
        ("a\0.npy", "no name"),
        ("x" * 240 + ".npy", "244 bytes, and 237 are the most"),
    ):
        with pytest.raises(InputError, match=text):
            checked_path(str(tmp_path / name) if name and "\0" not in name else name)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory"):
        checked_path(tmp_path / "file" / "a.npy")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([["depth"], ["mask"]], ["depth", "mask"]),
        ([[0], [1]], ["0", "1"]),
        ([["a", 0], ["a", 1]], ["a-0", "a-1"]),
        ([["../../etc/x"], [".hidden"]], ["__.._etc_x", "_hidden"]),
        ([["a/b"], ["a b"]], ["0", "1"]),
        ([["Mask"], ["mask"]], ["0", "1"]),
    ],
)
def test_labels(keys, expected):
    assert labels(keys) == expected
    assert not any(set("/\0") & set(label) for label in labels(keys))


def test_the_lock_says_who(tmp_path):
    held = Workplace(tmp_path / "out.npy")
    said = json.loads((held.folder / "lock").read_text())
    assert said["process"] == os.getpid()
    held.close()
