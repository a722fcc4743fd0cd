"""Keras models from file to file: the numbers of `predict`, inside the memory, and the same bytes after any stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import ranger_nn
from ranger_nn.cli.main import main
from ranger_nn.errors import BudgetError, InputError
from ranger_nn.execute.files import steps
from ranger_nn.keras.prepare import prepare

ROWS, COLUMNS = 96, 40


class Stopped(Exception):
    """Raised in the middle."""


def stop_after(count: int) -> Any:
    seen: list[int] = []

    def on_region(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) >= count:
            raise Stopped

    return on_region


def local(x: Any) -> Any:
    """One sweep: strides, a long window around them, dilation."""
    x = L.Conv2D(6, 3, padding="same", activation="relu")(x)
    y = L.Conv2D(8, 3, strides=2, padding="same", dilation_rate=1, activation="relu")(x)
    y = L.UpSampling2D(2)(L.Conv2D(6, 3, padding="same", dilation_rate=2)(y))
    return L.Conv2D(4, 3, padding="same")(L.Concatenate()([x, y]))


def normed(x: Any) -> Any:
    """Two sweeps with a value between them."""
    x = L.GroupNormalization(2)(L.Conv2D(4, 3, padding="same")(x))
    return L.Conv2D(3, 3, padding="same")(L.Activation("relu")(x))


def gated(x: Any) -> Any:
    """A reduction over all rows that scales them."""
    x = L.Conv2D(4, 3, padding="same", activation="relu")(x)
    gate = L.Dense(4, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    return L.Conv2D(3, 5, padding="same")(x * gate)


def three(x: Any) -> Any:
    """Two pictures of two sizes and scores, by name."""
    y = L.Conv2D(4, 3, padding="same")(x)
    return {"mask": y, "half": L.AveragePooling2D(2)(y), "score": L.Dense(3)(L.GlobalMaxPooling2D()(y))}


NETS = {"local": local, "normed": normed, "gated": gated, "three": three}


def network(name: str, sized: bool = False) -> keras.Model:
    """The same weights at each call."""
    keras.utils.set_random_seed(0)
    start = L.Input((ROWS, COLUMNS, 3) if sized else (None, None, 3))
    return keras.Model(start, NETS[name](start))


def image() -> Any:
    return np.random.default_rng(0).random((3, ROWS, COLUMNS)).astype(np.float32)


def untouched(net: keras.Model, x: Any) -> Any:
    """(channels, rows, columns) of each output."""
    found = net.predict(x.transpose(1, 2, 0)[None], verbose=0)
    return keras.tree.map_structure(lambda y: y[0].transpose(2, 0, 1) if y.ndim == 4 else y, found)


@pytest.mark.parametrize("name", ["local", "normed", "gated"])
def test_numbers(tmp_path: Path, name: str) -> None:
    net, x = network(name), image()
    report = ranger_nn.run(net, x, tmp_path / "out.npy", "300kB")
    expected = untouched(net, x)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=5e-5)
    np.testing.assert_allclose(report.statistics["output 0"]["mean"], expected.mean((1, 2)), atol=1e-4)
    assert report.projected <= report.allowed == 300_000
    assert report.regions > 4
    assert report.bytes_read == x.nbytes
    assert os.listdir(tmp_path) == ["out.npy"]


def test_pictures_and_scores(tmp_path: Path) -> None:
    net, x = network("three", sized=True), image()
    report = ranger_nn.run(net, x, tmp_path / "out.npy", regions=(10,))
    expected = untouched(net, x)
    for name in ("mask", "half"):
        np.testing.assert_allclose(np.load(tmp_path / f"out-{name}.npy"), expected[name], atol=1e-5)
    np.testing.assert_allclose(report.values["score"], expected["score"], atol=1e-5)


@pytest.mark.parametrize("name", sorted(NETS))
def test_stopped_again_and_again(tmp_path: Path, name: str) -> None:
    """The same bytes and statistics; no region is done twice."""
    net, x, rng, before = network(name), image(), np.random.default_rng(0), 0
    whole = ranger_nn.run(net, x, tmp_path / "whole.npy", regions=(10,))
    while True:
        done: list[int] = []
        limit = int(rng.integers(1, 9))

        def on_region(k: int, total: int, done: list[int] = done, limit: int = limit) -> None:
            done.append(k)
            if len(done) >= limit:
                raise Stopped

        try:
            report = ranger_nn.run(net, x, tmp_path / "cut.npy", regions=(10,), on_region=on_region)
        except Stopped:
            assert done[0] == before + 1
            before = done[-1]
            continue
        break
    files = [p.name for p in tmp_path.glob("whole*.npy")]
    assert len(files) == (2 if name == "three" else 1)
    for file in files:
        assert (tmp_path / file.replace("whole", "cut")).read_bytes() == (tmp_path / file).read_bytes()
    assert report.statistics == whole.statistics
    assert report.values == whole.values
    assert report.resumed_at == before > 3


def test_going_on_reads_the_halo_not_the_image(tmp_path: Path) -> None:
    """Windows are made again from the few steps that they depend on."""
    net, x = network("gated"), np.tile(image(), (1, 8, 1))
    options: dict[str, Any] = {"regions": (8,)}
    with pytest.raises(Stopped):
        ranger_nn.run(net, x, tmp_path / "out.npy", **options, on_region=stop_after(150))
    report = ranger_nn.run(net, x, tmp_path / "out.npy", **options)
    assert report.resumed_at == 150 < report.regions
    assert report.bytes_read == 0  # the second sweep reads what the first one stored
    with pytest.raises(Stopped):
        ranger_nn.run(net, x, tmp_path / "other.npy", **options, on_region=stop_after(50))
    report = ranger_nn.run(net, x, tmp_path / "other.npy", **options)
    assert report.bytes_read <= x.nbytes * (768 - 48 * 8 + 2 * 8) / 768
    assert (tmp_path / "other.npy").read_bytes() == (tmp_path / "out.npy").read_bytes()


def test_other_work_does_not_go_on(tmp_path: Path) -> None:
    x = image()
    with pytest.raises(Stopped):
        ranger_nn.run(network("local"), x, tmp_path / "out.npy", regions=(7,), on_region=stop_after(3))
    other = network("local")
    other.layers[1].set_weights([w + 1 for w in other.layers[1].get_weights()])
    with pytest.raises(InputError, match="another model"):
        ranger_nn.run(other, x, tmp_path / "out.npy", regions=(7,))
    with pytest.raises(InputError, match="another model, plan"):
        ranger_nn.run(network("local"), x, tmp_path / "out.npy", regions=(20,))
    assert ranger_nn.run(network("local"), x, tmp_path / "out.npy", regions=(7,)).resumed_at == 3


def test_refusals(tmp_path: Path) -> None:
    a, b = L.Input((None, None, 3)), L.Input((None, None, 3))
    with pytest.raises(InputError, match="takes 2 inputs"):
        ranger_nn.run(keras.Model([a, b], a + b), image(), tmp_path / "out.npy")
    with pytest.raises(InputError, match="leave device out"):
        ranger_nn.run(network("local"), image(), tmp_path / "out.npy", device="cuda")
    with pytest.raises(BudgetError, match=r"does not fit in 30.0 kB.*bound by") as small:
        ranger_nn.run(network("local"), image(), tmp_path / "out.npy", "30kB")
    assert prepare(network("local"), image(), small.value.least).projected <= (small.value.least or 0)
    with pytest.raises(InputError, match="slid along, not tiled"):
        ranger_nn.run(network("local"), image(), tmp_path / "out.npy", schedule="tile")
    assert os.listdir(tmp_path) == []


def test_dry_run() -> None:
    made = prepare(network("gated"), image(), "300kB")
    assert made.projected <= 300_000
    assert "reading and writing" in str(made)
    assert 0 < made.expected_seconds() < 60


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="only PyTorch's bytes are counted")
@pytest.mark.parametrize("name", ["local", "normed"])
def test_memory(tmp_path: Path, name: str) -> None:
    """Measured is within projected, however many rows there are."""
    net, x = network(name), np.tile(image(), (1, 20, 1))
    ranger_nn.run(net, x, tmp_path / "warm.npy", "400kB")
    with ranger_nn.measure() as used:
        report = ranger_nn.run(net, x, tmp_path / "out.npy", "400kB")
    assert used.peak <= report.projected <= report.allowed == 400_000 < x.nbytes


def command(model: Path, source: Path, out: Path) -> list[str]:
    code = "import sys; from ranger_nn.cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", code, "run", str(model), str(source), "-o", str(out), "--regions", "2", "--quiet"]


def test_command_line_killed(tmp_path: Path) -> None:
    """SIGKILL; the same command goes on; the bytes are those of one run."""
    network("normed").save(tmp_path / "net.keras")
    np.save(tmp_path / "in.npy", image())
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    assert main(command(tmp_path / "net.keras", tmp_path / "in.npy", whole)[3:]) == 0
    np.testing.assert_allclose(np.load(whole), untouched(network("normed"), image()), atol=5e-5)
    journal = tmp_path / ".cut.npy.partial" / "journal.json"
    with subprocess.Popen(command(tmp_path / "net.keras", tmp_path / "in.npy", cut)) as process:
        while process.poll() is None and not journal.exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not cut.exists()
    subprocess.run(command(tmp_path / "net.keras", tmp_path / "in.npy", cut), check=True)
    assert cut.read_bytes() == whole.read_bytes()


def test_command_line_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "in.npy", image())
    (tmp_path / "bad.keras").write_text("no model")
    for arguments, said in (
        (["run", "none.keras", str(tmp_path / "in.npy"), "-o", str(tmp_path / "o.npy")], "there is no such file"),
        (["run", str(tmp_path / "bad.keras"), str(tmp_path / "in.npy"), "-o", str(tmp_path / "o.npy")], "cannot be loaded"),
        (["run", "none.keras", "1x3x8x8", "-o", str(tmp_path / "o.npy")], "from file to file alone"),
        (["run", "n.keras", str(tmp_path / "in.npy"), "-o", str(tmp_path / "o.npy"), "--threads", "1"], "--threads is for"),
    ):  # fmt: skip
        assert main(arguments) == 1
        assert said in capsys.readouterr().err


def test_steps_too_few_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are made again by fewer steps than they depend on are others: the bytes differ."""
    net, x, options = network("local"), np.tile(image(), (1, 3, 1)), {"regions": (8,)}
    ranger_nn.run(net, x, tmp_path / "whole.npy", **options)
    for name, settled in (("all", steps.settles), ("one", lambda graph, loop: 1)):
        monkeypatch.setattr(steps, "settles", settled)
        with pytest.raises(Stopped):
            ranger_nn.run(net, x, tmp_path / f"{name}.npy", **options, on_region=stop_after(15))
        assert ranger_nn.run(net, x, tmp_path / f"{name}.npy", **options).resumed_at == 15
        same = (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
        assert same == (name == "all")
